import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from bgray import report
from bgray.answers import Record
from bgray.compare import compare_sweep
from bgray.specimen import Made, make

NAUGHTY = "<script>alert(1)</script> | *x*"
VARIANTS = [
    Made("kernel 41"),
    Made("growing", {"model.kernels": [7, 23, 41]}, gain=0.05),
    Made(NAUGHTY, {"optim.lr": 0.01}, gain=-0.1),
]


def sweep(folder, variants=VARIANTS, **options):
    settings = {"seeds": 2, "steps": 100, "evaluations": 2, "items": 4, "clip_seconds": 0.05}
    make(str(folder), variants, **(settings | options))
    return Path(folder)


def write(*folders, to=None):
    """Lines that were printed."""
    return list(report.write([str(folder) for folder in folders], to and str(to)))


def rows(text):
    """The cells of the tables' rows by the last cell, which is the id in the first table."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    return {cells[-1].strip(): [cell.strip() for cell in cells] for cells in lines}


def ids(folder):
    manifest = json.loads((Path(folder) / "sweep.json").read_text())
    return {entry["label"]: id for id, entry in manifest["variants"].items()}


def noted(folder, id, note):
    """Type a note into the row of a variant."""
    path = Path(folder) / "REPORT.md"
    old = path.read_text()
    new = re.sub(rf"\|[^|\n]*\| {re.escape(id)} \|", lambda _: f"| {note} | {id} |", old)
    assert new != old
    path.write_text(new)


def test_report_and_json_have_the_very_digits_of_compare(tmp_path):
    folder = sweep(tmp_path / "kernels")
    write(folder)
    text = (folder / "REPORT.md").read_text()
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]
    page = (folder / "report.html").read_text()
    for metric in ("val_stft", "val_si_sdr"):
        comparison = compare_sweep(str(folder), metric)
        assert raw["comparisons"][metric] == json.loads(json.dumps(comparison.to_json()))
        console = Console(file=io.StringIO(), width=300)
        console.print(comparison.table())
        shown = console.file.getvalue()
        assert comparison.method() in page
        for row in comparison.rows:
            cells = rows(text)[row.id]
            line = next(
                line for line in shown.splitlines() if line[1:].strip().startswith(row.label)
            )
            there = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
            mean, difference = there[3], there[4]
            place = 4 if metric == "val_stft" else 7
            assert cells[place : place + 2] == [mean, difference]
            assert cells[2:4] == there[1:3] or metric != "val_stft"
            assert mean in page
            assert difference in page
            if metric == "val_stft":
                assert cells[-3] == there[6]
            if row.parts:
                assert cells[place + 2] == f"{row.baseline_mean:.4f}"


def test_rows_keep_the_sweeps_order_whatever_the_rank_and_nothing_in_them_is_padded(tmp_path):
    folder = sweep(tmp_path / "kernels", [VARIANTS[2], VARIANTS[0], VARIANTS[1]])
    write(folder)
    text = (folder / "REPORT.md").read_text()
    wanted = [ids(folder)[label] for label in (NAUGHTY, "kernel 41", "growing")]
    assert [id for id in rows(text) if id in wanted] == wanted
    assert rows(text)["input"][4] == "2.0000"
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else []
        assert [cell for cell in cells if cell not in ("  ", f" {cell.strip()} ")] == []
    assert "\\<script>alert(1)\\</script> \\| \\*x\\*" in text


def test_the_report_names_neither_time_nor_place(tmp_path):
    where = f"OSError: no room in {tmp_path}/kernels/x/checkpoint, /home/somebody/python/torch.py"
    failed = Made("b", {"optim.lr": 0.1}, state="failed", until=50, reason=where)
    folder = sweep(tmp_path / "kernels", [VARIANTS[0], failed])
    write(folder)
    one = (folder / "REPORT.md").read_bytes()
    assert b"b, seed 0" in one
    assert b"failed at step 50: OSError: no room in .../x/checkpoint, .../python/torch.py" in one
    moved = tmp_path / "elsewhere" / "kernels"
    shutil.copytree(folder, moved)
    (moved / "REPORT.md").unlink()
    write(moved)
    assert (moved / "REPORT.md").read_bytes() == one
    for name in ("REPORT.md", "report.html", "report.json"):
        assert str(tmp_path) not in (folder / name).read_text()
    write(folder)
    assert (folder / "REPORT.md").read_bytes() == one


def test_ear_notes_survive_and_are_told_in_all_files_and_the_table(tmp_path):
    folder = sweep(tmp_path / "kernels")
    write(folder)
    growing, naughty = ids(folder)["growing"], ids(folder)[NAUGHTY]
    noted(folder, growing, "softer \\| less <i>robotic</i>")
    noted(folder, "input", "chipmunks")
    said = write(folder)
    assert said[0] == f"{folder}/REPORT.md: 3 variants, 2 ear notes"
    assert sorted(path.name for path in folder.glob("*.md")) == ["REPORT.md"]
    text = (folder / "REPORT.md").read_text()
    assert rows(text)[growing][-2] == "softer \\| less <i>robotic</i>"
    assert rows(text)["input"][-2] == "chipmunks"
    note = "softer | less <i>robotic</i>"
    assert "softer | less &lt;i&gt;robotic&lt;/i&gt;" in (folder / "report.html").read_text()
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]
    assert {v["id"]: v["ear_notes"] for v in raw["variants"]}[growing] == note
    assert raw["notes"] == {"input": "chipmunks"}
    table = report.frame(str(folder))
    assert set(table[table.variant == growing].ear_notes) == {note}
    assert set(table[table.variant == naughty].ear_notes) == {""}


def test_notes_stay_while_variants_come_and_go(tmp_path):
    folder = sweep(tmp_path / "kernels")
    write(folder)
    growing, base = ids(folder)["growing"], ids(folder)["kernel 41"]
    noted(folder, growing, "soft")
    noted(folder, base, "harsh")
    shutil.copy(folder / "REPORT.md", tmp_path / "kept.md")
    shutil.rmtree(folder)
    sweep(folder, [VARIANTS[0], Made("new one", {"optim.lr": 0.1})])
    shutil.copy(tmp_path / "kept.md", folder / "REPORT.md")
    said = "2 variants, 2 ear notes, 1 of variants that are gone"
    assert write(folder)[0] == f"{folder}/REPORT.md: {said}"
    text = (folder / "REPORT.md").read_text()
    assert rows(text)[base][-2] == "harsh"
    assert f"| growing | soft | {growing} |" in text.partition("## Ear notes of variants")[2]
    write(folder)  # from the list it comes back as well
    shutil.copy(folder / "REPORT.md", tmp_path / "kept.md")
    shutil.rmtree(folder)
    sweep(folder)
    shutil.copy(tmp_path / "kept.md", folder / "REPORT.md")
    write(folder)
    text = (folder / "REPORT.md").read_text()
    assert rows(text)[growing][-2] == "soft"
    assert "variants that are gone" not in text


def test_what_else_a_person_changed_is_kept_beside_and_never_overwritten(tmp_path):
    folder = sweep(tmp_path / "kernels")
    write(folder)
    path = folder / "REPORT.md"
    for number in ("", ".2", ".3"):
        changed = path.read_text() + f"\nMy own words{number}.\n"
        path.write_text(changed)
        said = write(folder)
        old = folder / f"REPORT.old{number}.md"
        assert (
            said[0] == f"{old}: REPORT.md as it was, for more than ear notes had been changed in it"
        )
        assert old.read_text() == changed
        assert "My own words" not in path.read_text()
    assert (folder / "REPORT.old.md").read_text().endswith("My own words.\n")


def test_a_report_that_is_not_understood_is_never_overwritten(tmp_path, capsys):
    folder = sweep(tmp_path / "kernels")
    path = folder / "REPORT.md"
    path.write_text("# My own report\n")
    with pytest.raises(SystemExit) as caught:
        report.main([str(folder)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert (
        f"{path}:\n  line 1: holds no table with the columns 'ear notes' and 'id'; mend it" in said
    )
    assert path.read_text() == "# My own report\n"
    assert not (folder / "report.html").exists()
    report.main([str(folder), "--to", str(tmp_path / "there")])
    assert (tmp_path / "there" / "REPORT.md").exists()


def test_a_running_sweep_is_reported_and_says_how_far_it_is(tmp_path):
    running = Made("b", {"optim.lr": 0.1}, state="running", until=50)
    waiting = Made("c", {"optim.lr": 0.2}, state="waiting")
    folder = sweep(tmp_path / "kernels", [VARIANTS[0], running, waiting])
    wanted = "1 of 6 trials still running, as of step 50, 2 waiting; 3 finished"
    assert write(folder)[0] == f"{folder}: {wanted}"
    assert f"{wanted}." in (folder / "REPORT.md").read_text()
    assert wanted in (folder / "report.html").read_text()
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]
    assert raw["states"] == {"running": 1, "waiting": 2, "finished": 3}
    assert raw["over"] is False


def test_a_sweep_that_has_not_been_evaluated_yet_says_why_nothing_is_compared(tmp_path):
    folder = sweep(tmp_path / "kernels", [Made("a", state="waiting"), Made("b", state="waiting")])
    write(folder)
    text = (folder / "REPORT.md").read_text()
    assert "4 of 4 trials waiting (nobody works on them: the same command goes on)." in text
    assert "Nothing is compared: no run has been evaluated yet" in text


def test_several_sweeps_make_one_report_in_the_folder_they_have_in_common(tmp_path):
    one, two = sweep(tmp_path / "all" / "a"), sweep(tmp_path / "all" / "b", VARIANTS[:2])
    write(one)
    growing = ids(one)["growing"]
    noted(one, growing, "soft")
    said = write(one, two)
    assert said[0] == f"{tmp_path}/all/REPORT.md: 5 variants, 1 ear note"
    text = (tmp_path / "all" / "REPORT.md").read_text()
    assert re.findall("^#+ (.*)$", text, re.M)[:2] == ["2 sweeps", "a"]
    assert rows(text)[f"a/{growing}"][-2] == "soft"  # from the sweep's own report
    assert f"b/{ids(two)['growing']}" in rows(text)
    noted(one, growing, "harsh")
    assert f"a/{growing}: another ear note in {one}/REPORT.md; the one here is kept" in write(
        one.parent
    )
    assert rows((one.parent / "REPORT.md").read_text())[f"a/{growing}"][-2] == "soft"
    raw = json.loads((one.parent / "report.json").read_text())
    assert [s["folder"] for s in raw["sweeps"]] == ["a", "b"]
    table = report.frame(str(one.parent))
    assert list(table.groupby("sweep").size()) == [6, 4]


def test_sweeps_that_have_their_last_two_names_in_common_stay_apart(tmp_path, s3):
    one = sweep(tmp_path / "p" / "results" / "s", VARIANTS[:2], seeds=1)
    there = f"{s3}/q/results/s"
    make(there, VARIANTS[:2], seeds=1, steps=100, evaluations=2, items=4, clip_seconds=0.1)
    said = write(one, there, to=tmp_path / "both")
    text = (tmp_path / "both" / "REPORT.md").read_text()
    heads = re.findall("^## (.*)$", text, re.M)
    assert heads == ["p/results/s", "q/results/s"]
    growing = ids(one)["growing"]
    assert {f"p/results/s/{growing}", f"q/results/s/{growing}"} <= set(rows(text))
    page = (tmp_path / "both" / "report.html").read_text()
    links = re.findall(r'<audio [^>]*src="([^"]+)"', page)
    assert len({*links}) == len(links) == 2 * 2 * 4  # sweeps, items, sounds
    assert len({(tmp_path / "both" / link).stat().st_size for link in links}) == 2
    assert any("16 clips copied" in line for line in said)


def test_names_are_as_short_as_they_can_be_and_numbered_where_all_is_the_same():
    from bgray.report import _names

    assert _names(["/a/s", "s3://b/t"]) == ["s", "t"]
    assert _names(["/a/x/s", "/b/x/s", "/b/y/s"]) == ["a/x/s", "b/x/s", "b/y/s"]
    assert _names(["/b/x/s", "s3://b/x/s"]) == ["1/b/x/s", "2/b/x/s"]


def test_notes_stay_in_their_rows_when_other_sweeps_join_or_leave_the_report(tmp_path):
    one, two = sweep(tmp_path / "p" / "a"), sweep(tmp_path / "p" / "b", VARIANTS[:2])
    three, there = sweep(tmp_path / "q" / "c", VARIANTS[:2]), tmp_path / "there"
    write(one, to=there)
    growing = ids(one)["growing"]
    noted(there, growing, "soft")
    assert f"a/{growing}: has the ear note that was at {growing}" in write(one, two, to=there)
    noted(there, "b/input", "chipmunks")
    for folders, wanted in (
        ((one, two, three), {f"p/a/{growing}": "soft", "p/b/input": "chipmunks"}),
        ((one, two), {f"a/{growing}": "soft", "b/input": "chipmunks"}),
    ):
        said = write(*folders, to=there)
        assert len([line for line in said if "has the ear note that was at" in line]) == 2
        found = rows((there / "REPORT.md").read_text())
        assert {id: cells[-2] for id, cells in found.items() if id in wanted} == wanted
    # Of another sweep that has such a row too, it is not.
    write(two, to=there)
    text = (there / "REPORT.md").read_text()
    assert rows(text)["input"][-2] == "chipmunks"
    assert f"| growing | soft | a/{growing} |" in text.partition("## Ear notes of variants")[2]


def test_a_note_that_was_cleared_in_the_common_report_does_not_come_back(tmp_path):
    one = sweep(tmp_path / "all" / "a")
    sweep(tmp_path / "all" / "b", VARIANTS[:2])
    write(one)
    growing = ids(one)["growing"]
    noted(one, growing, "soft")
    write(one.parent)
    noted(one.parent, f"a/{growing}", "")
    said = write(one.parent)
    assert rows((one.parent / "REPORT.md").read_text())[f"a/{growing}"][-2] == ""
    where = f"the ear note in {one}/REPORT.md is left out"
    assert f"a/{growing}: {where}, this row has had none" in said
    assert set(report.frame(str(one.parent)).ear_notes) == {""}


@pytest.mark.parametrize(
    "name", ["a|b", "<b>x", "new\nline", "x`y", "50% a%20b", "back\\slash", "_a_", " x ", "ü"]
)
def test_whatever_a_folder_is_called_its_report_is_read_again(tmp_path, name):
    folder = sweep(tmp_path / "all" / name, VARIANTS[:2], seeds=1)
    sweep(tmp_path / "all" / "other", VARIANTS[:2], seeds=1)
    write(folder.parent)
    path = folder.parent / "REPORT.md"
    id = report.notes.id_cell(f"{name}/{ids(folder)['growing']}")
    noted(folder.parent, id, "soft")
    said = write(folder.parent)
    assert said[0] == f"{path}: 4 variants, 1 ear note"
    assert rows(path.read_text())[id][-2] == "soft"
    assert not list(folder.parent.glob("REPORT.old*"))
    table = report.frame(str(folder.parent))
    assert set(table[table.sweep == name].ear_notes) == {"", "soft"}


def test_a_damaged_sweep_among_others_is_left_out_and_named(tmp_path):
    one, two = sweep(tmp_path / "a"), sweep(tmp_path / "b", VARIANTS[:2])
    (two / "sweep.json").write_text("{")
    said = write(tmp_path)
    assert said[0].startswith(f"left out: {two}/sweep.json: is damaged")
    assert f"a/{ids(one)['growing']}" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["kernel"], "is no folder; did you mean 'kernels'?"),
        (["empty"], "holds no sweep; give a sweep's folder"),
        (["kernels/RUN"], "is one run; give its sweep's folder"),
    ],
)
def test_what_is_no_sweep_is_an_error_with_the_way_out(tmp_path, capsys, given, said):
    folder = sweep(tmp_path / "kernels")
    run = next(path.parent.name for path in folder.glob("*/run.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        report.main([str(tmp_path / path.replace("RUN", run)) for path in given])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("REPORT*"))


def test_a_report_written_elsewhere_takes_its_clips_along(tmp_path):
    folder = sweep(tmp_path / "kernels")
    there = tmp_path / "mail"
    said = write(folder, to=there)
    assert not (folder / "REPORT.md").exists()
    page = (there / "report.html").read_text()
    links = re.findall(r'<audio [^>]*src="([^"]+)"', page)
    assert len(links) == 2 * 5  # items; input, target and three variants
    for link in links:
        assert (there / link).read_bytes() == (folder / link).read_bytes()
    assert any("10 clips copied beside them" in line for line in said)
    everything = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert everything == {*links, "REPORT.md", "report.html", "report.json"}


def test_pictures_are_taken_along_and_what_stays_is_not_named(tmp_path):
    folder = sweep(tmp_path / "rolls", VARIANTS[:2], clip_steps=2)
    for sound in folder.glob("*/clips/*.wav"):
        sound.with_suffix(".png").write_bytes(b"a picture of " + sound.name.encode())
    there = tmp_path / "mail"
    said = write(folder, to=there)
    assert any("8 clips and 8 pictures copied beside them" in line for line in said)
    page = (there / "report.html").read_text()
    links = re.findall(r'<(?:audio|img) [^>]*src="([^"]+)"', page)
    assert len([link for link in links if link.endswith(".png")]) == 8
    for link in links:
        assert (there / link).read_bytes() == (folder / link).read_bytes()
    raw = json.loads((there / "report.json").read_text())["sweeps"][0]
    named = [clip for v in raw["variants"] for trial in v["trials"] for clip in trial["clips"]]
    assert sorted(named) == sorted({*links})
    write(folder)
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]
    named = [clip for v in raw["variants"] for trial in v["trials"] for clip in trial["clips"]]
    assert sorted(named) == sorted(
        path.relative_to(folder).as_posix() for path in folder.glob("*/clips/*")
    )


def test_a_sweep_on_s3_has_the_same_report_as_a_local_one(tmp_path, s3):
    from bgray import storage

    folder = sweep(tmp_path / "kernels")
    make(f"{s3}/r/kernels", VARIANTS, seeds=2, steps=100, evaluations=2, items=4, clip_seconds=0.05)
    write(folder)
    assert write(f"{s3}/r/kernels")[0] == f"{s3}/r/kernels/REPORT.md: 3 variants, 0 ear notes"
    text = storage.read_bytes(f"{s3}/r/kernels/REPORT.md")
    assert text == (folder / "REPORT.md").read_bytes()
    growing = ids(folder)["growing"]
    edited = text.replace(f"|  | {growing} |".encode(), f"| soft | {growing} |".encode())
    storage.write_bytes(f"{s3}/r/kernels/REPORT.md", edited)
    write(f"{s3}/r", to=tmp_path / "here")
    assert f"| soft | kernels/{growing} |" in (tmp_path / "here" / "REPORT.md").read_text()
    assert list((tmp_path / "here" / "kernels").rglob("*.wav"))
    assert set(report.frame(f"{s3}/r/kernels").ear_notes) == {"", "soft"}


def test_sweeps_without_a_folder_in_common_need_to(tmp_path, s3):
    from bgray.config import ConfigError

    folder = sweep(tmp_path / "kernels", VARIANTS[:2])
    make(f"{s3}/r/widths", VARIANTS[:2], seeds=1, steps=10, evaluations=1, items=2, clips=0)
    with pytest.raises(ConfigError, match="no folder in common; .* --to FOLDER"):
        write(folder, f"{s3}/r/widths")
    write(folder, f"{s3}/r/widths", to=tmp_path / "both")
    heads = re.findall("^## (.*)$", (tmp_path / "both" / "REPORT.md").read_text(), re.M)
    assert heads == ["kernels", "widths"]


def test_json_has_no_nan_and_every_setting(tmp_path):
    folder = sweep(tmp_path / "kernels")
    run = next(path for path in folder.glob("*/run.json"))
    info = json.loads(run.read_text())
    info["metrics"]["val_stft"] = float("nan")
    run.write_text(json.dumps(info))
    write(folder)

    def refuse(name):
        raise AssertionError(name)

    raw = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert raw["schema"] == 1
    growing = raw["sweeps"][0]["variants"][1]
    assert growing["changes"] == {"model.kernels": {"baseline": [41], "here": [7, 23, 41]}}
    assert growing["settings"]["optim.lr"] == 0.005
    metrics = {t["id"]: t["metrics"] for v in raw["sweeps"][0]["variants"] for t in v["trials"]}
    assert metrics[info["id"]]["val_stft"] is None


def test_the_table_has_a_row_per_trial_with_settings_and_scores_at_both_steps(tmp_path):
    early = Made("b", {"optim.lr": 0.1}, state="stopped", until=50)
    folder = sweep(tmp_path / "kernels", [VARIANTS[0], VARIANTS[1], early])
    table = report.frame(str(folder))
    assert list(table.seed) == [0, 1] * 3
    assert list(table["model.kernels"]) == ["[41]"] * 2 + ["[7, 23, 41]"] * 2 + ["[41]"] * 2
    assert list(table["optim.lr"]) == [0.005] * 4 + [0.1] * 2
    assert list(table.state) == ["finished"] * 4 + ["stopped", "finished"]
    assert list(table.evaluated_step) == [100] * 4 + [50, 100]
    assert list(table.matched_step) == [100] * 4 + [50] * 2
    comparison = compare_sweep(str(folder))
    for row in comparison.rows:
        mine = table[table.variant == row.id]
        assert mine.val_stft_matched.mean() == pytest.approx(row.mean, rel=1e-12)
    last = table[table.label == "b"]
    assert last.val_stft_matched.iloc[0] == pytest.approx(last.val_stft.iloc[0], rel=1e-6)
    assert last.val_stft_matched.iloc[1] > last.val_stft.iloc[1]


def without(folder, label, score, seeds, after=0):
    """Take a score away from the evaluations behind step `after`."""
    manifest = json.loads((folder / "sweep.json").read_text())
    entry = next(e for e in manifest["variants"].values() if e["label"] == label)
    for seed in seeds:
        path = folder / entry["runs"][seed] / "validation_items.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if line["step"] > after:
                line[score] = [None] * len(line[score])
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_further_score_of_another_step_or_of_other_seeds_says_so_everywhere(tmp_path):
    folder = sweep(tmp_path / "kernels", [VARIANTS[0], VARIANTS[1]])
    without(folder, "growing", "val_si_sdr", "01", after=50)
    write(folder)
    growing = ids(folder)["growing"]
    row = next(r for r in compare_sweep(str(folder), "val_si_sdr").rows if r.id == growing)
    assert row.step == 50
    wanted = f"{row.mean:.4f} ± {row.seed_deviation:.4f} (step 50, 2 seeds)"
    found = rows((folder / "REPORT.md").read_text())[growing]
    assert (found[3], found[7]) == ("100", wanted)
    assert wanted in (folder / "report.html").read_text()
    table = report.frame(str(folder))
    mine = table[table.variant == growing]
    assert mine.val_si_sdr_matched.mean() == pytest.approx(row.mean, rel=1e-12)
    assert set(mine.val_si_sdr_matched_step) == {50}
    assert set(mine.val_stft_matched_step) == set(mine.matched_step) == {100}
    without(folder, "growing", "val_si_sdr", "1")
    write(folder)
    text = (folder / "REPORT.md").read_text()
    assert rows(text)[growing][7].endswith(" (step 50, 1 seed)")
    log = text.partition("growing\n  kernels")[2]
    assert re.search(
        r"^  val_si_sdr [^()\n]* from the baseline's [-\d.]+, step 50, 1 seed$", log, re.M
    )


def test_of_absolute_paths_in_settings_only_the_end_is_told(tmp_path):
    one, two = f"{tmp_path}/my music/some/set", f"{tmp_path}/my music/other/set"
    variants = [Made("a", {"data.path": one}), Made("b", {"data.path": two})]
    folder = sweep(tmp_path / "kernels", variants)
    write(folder)
    b = ids(folder)["b"]
    found = rows((folder / "REPORT.md").read_text())[b]
    assert found[1] == "path .../some/set → .../other/set"
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]["variants"]
    assert [v["settings"]["data.path"] for v in raw] == [".../some/set", ".../other/set"]
    assert raw[1]["changes"] == {"data.path": {"baseline": ".../some/set", "here": ".../other/set"}}
    for name in ("REPORT.md", "report.json"):
        assert "my music" not in (folder / name).read_text()


def population(folder):
    """Three members, of which the first has copied the second."""
    variants = [Made(f"member {i}", {"optim.lr": 0.1 * (i + 1)}, gain=0.1 * i) for i in range(3)]
    folder = sweep(folder, variants, seeds=1)
    path = folder / "sweep.json"
    manifest = json.loads(path.read_text())
    runs = [entry["runs"]["0"] for entry in manifest["variants"].values()]
    for number, entry in enumerate(manifest["variants"].values()):
        entry["runs"] = {str(number): runs[number]}
    schedule = [
        {"step": 0, "member": runs[1], "values": {"optim.lr": 0.2}},
        {"step": 50, "member": runs[0], "values": {"optim.lr": 0.25}},
    ]
    found = {"winner": runs[0], "schedule": schedule}
    path.write_text(json.dumps({**manifest, "pbt": {"rounds": [], "found": found}}))
    return folder


def test_members_of_a_population_are_not_judged_and_its_schedule_is_told(tmp_path, capsys):
    from bgray import compare

    folder = population(tmp_path / "members")
    write(folder)
    text, page = (folder / "REPORT.md").read_text(), (folder / "report.html").read_text()
    why = "members of a population copy from each other; they are no variants to compare"
    found = rows(text)
    infos = {i["variant"]: i for p in folder.glob("*/run.json") if (i := json.loads(p.read_text()))}
    for label, id in ids(folder).items():
        number = int(label[-1])
        info = infos[id]
        assert found[id][1] == f"at the start: lr {0.1 * (number + 1):g}"
        assert found[id][3:6] == ["100", f"{info['metrics']['val_stft']:.4f}", "-"]
        assert found[id][-3] == "-"
    for said in (
        "member 0, the best of 3 members, came by this schedule",
        "From step 0: optim.lr 0.2 (member 1)",
        "From step 50: optim.lr 0.25 (member 0)",
        why,
    ):
        assert said in text
        assert said in page
    assert "(baseline)" not in text
    assert "Members are chosen by val_stft (lower is better).\n" in text.replace("\\_", "_")
    assert "Compared by" not in text + page.partition("<script")[0]
    assert "against member" not in text + page
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]
    assert raw["comparisons"] == {}
    assert raw["baseline"] is None
    assert why in raw["not_compared"]
    assert raw["population"]["found"]["schedule"][1]["step"] == 50
    with pytest.raises(SystemExit) as caught:
        compare.main([str(folder)])
    assert caught.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_one_member_of_a_population_can_be_compared_with_a_variant_of_another_sweep(tmp_path):
    from bgray.compare import compare
    from bgray.variants import find

    folder, other = population(tmp_path / "members"), sweep(tmp_path / "b", VARIANTS[:1])
    found, name, _ = find([f"{folder}/member 0", str(other)])
    assert [row.step for row in compare(found, name=name).rows] == [100, 100]


def test_blind_tests_are_told_beside_the_scores(tmp_path):
    folder = sweep(tmp_path / "kernels")
    write(folder)
    assert "blind rank" not in (folder / "REPORT.md").read_text()
    growing, base = ids(folder)["growing"], ids(folder)["kernel 41"]
    lanes = [
        {"variant": base, "label": "kernel 41", "run": "r", "seed": 0},
        {"variant": growing, "label": "growing", "run": "r", "seed": 0},
    ]
    facts = {"metric": "val_stft", "modes": {"val_stft": "min"}}
    ranking = Record(str(folder), "ranking", lanes, facts)
    ranking.add({"ranks": [2, 1], "scores": {"val_stft": [0.5, 0.4]}}, complete=True)
    abx = Record(str(folder), "abx", lanes, {"trials": 2})
    abx.add({"right": True}, complete=False)
    abx.add({"right": True}, complete=True)
    (folder / "listening" / "broken.json").write_text("{")
    write(folder)
    text, page = (folder / "REPORT.md").read_text(), (folder / "report.html").read_text()
    assert rows(text)[growing][-5] == "1.00 (1)"
    assert rows(text)[base][-5] == "2.00 (1)"
    for said in (
        ": 2 of 2 right, p = 0.25",
        "Blind ranking: growing is placed best, mean rank 1.00 over 1 ranking",
        "Skipped: broken.json: is damaged",
    ):
        assert said in page
        assert said.replace("_", "") in text.replace("\\_", "").replace("_", "")
    raw = json.loads((folder / "report.json").read_text())["sweeps"][0]
    assert raw["listening"]["pairs"][0]["right"] == 2
