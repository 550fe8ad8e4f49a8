import json
from pathlib import Path

import pytest

from bgray import findings, report_clips
from bgray.report_page import page_of
from bgray.report_text import text_of
from bgray.specimen import Made, make


def section(folder, variants, name="", **options):
    settings = {"seeds": 2, "steps": 100, "evaluations": 4, "items": 4, "clip_seconds": 0.05}
    make(str(folder), variants, **(settings | options))
    return findings.read(str(folder), name)


def sounds(item):
    return {lane.name: (lane.seed, lane.step, lane.matched) for lane in item.lanes}


def test_each_variant_is_heard_where_it_is_compared_and_beside_it_the_baseline_there(tmp_path):
    early = Made("early", {"optim.lr": 0.1}, state="stopped", until=50)
    lost = Made("lost", {"optim.lr": 0.2}, state="diverged", until=25)
    found = section(tmp_path / "a", [Made("base"), early, lost], clip_steps=4)
    items = report_clips.listening(found)
    assert [item.number for item in items] == [0, 2]
    assert sounds(items[0]) == {
        "input": (None, None, True),
        "target": (None, None, True),
        "base": (0, 100, True),
        "early": (0, 50, True),
        "lost": (1, 100, True),  # seed 0 diverged and is not compared
    }
    base, other = items[0].lanes[2], items[0].lanes[3]
    assert other.file == "000-step-000050.wav"
    assert other.beside == (base.run, "000-step-000050.wav")
    assert base.beside is None


def test_where_there_is_no_clip_of_the_step_compared_at_the_last_one_before_is_said_so(tmp_path):
    found = section(tmp_path / "a", [Made("base"), Made("b", {"optim.lr": 0.1})], clip_steps=4)
    trial = next(t for t in found.results.trials.values() if t.label == "b" and t.seed == 0)
    (Path(trial.url) / "clips" / "000-step-000100.wav").unlink()
    items = report_clips.listening(findings.read(str(tmp_path / "a")))
    assert sounds(items[0])["b"] == (0, 75, False)
    assert sounds(items[1])["b"] == (0, 100, True)


def test_sources_are_items_of_their_own_with_one_input(tmp_path):
    found = section(tmp_path / "a", [Made("base")], sources=("drums", "vocals"), clips=1, seeds=1)
    items = report_clips.listening(found)
    assert [(item.number, item.source) for item in items] == [(0, "drums"), (0, "vocals")]
    assert [lane.file for lane in items[1].lanes] == [
        "000-input.wav",
        "000-target-vocals.wav",
        "000-step-000100-vocals.wav",
    ]


def test_scores_beyond_the_third_get_a_table_of_their_own(tmp_path, monkeypatch):
    found = section(tmp_path / "a", [Made("base"), Made("b", {"optim.lr": 0.1})])
    monkeypatch.setattr(findings, "WIDE", 1)
    keys = [column.key for column in findings.columns(found)]
    assert keys[4:7] == ["val_stft", "val_stft difference", "val_stft baseline"]
    assert "val_si_sdr" not in keys
    more = [column.key for column in findings.columns(found, more=True)]
    assert more == ["variant", "val_si_sdr", "val_si_sdr difference", "val_si_sdr baseline"]


def test_an_id_is_what_compare_takes_in_a_report_over_several_sweeps(tmp_path):
    from bgray.variants import find

    found = section(tmp_path / "a", [Made("base"), Made("b", {"optim.lr": 0.1})], "a")
    (variant,), _, _ = find([f"{tmp_path}/{found.id(found.entries[1].id)}"])
    assert variant.label == "b"


def test_who_ended_early_is_told_with_the_step_and_the_reason(tmp_path):
    why = "at step 50: rank 2 of 2"
    early = Made("b", {"optim.lr": 0.1}, state="stopped", until=50, reason=why)
    ((trial, text),) = findings.unfinished(section(tmp_path / "a", [Made("base"), early]))
    assert (trial.label, trial.seed) == ("b", 0)
    assert text == "stopped at step 50: rank 2 of 2"


def test_warnings_are_told_once_with_who_has_them(tmp_path):
    found = section(tmp_path / "a", [Made("base"), Made("b", {"optim.lr": 0.1})])
    for trial in list(found.results.trials.values())[:3]:
        path = Path(trial.url) / "run.json"
        info = json.loads(path.read_text())
        path.write_text(json.dumps({**info, "warnings": ["silent output at step 5"]}))
    ((text, trials),) = findings.warned(findings.read(str(tmp_path / "a")))
    assert text == "silent output at step 5"
    assert findings.who(trials) == "base (seeds 0, 1), b (seed 0)"


def test_a_log_entry_is_what_a_person_would_type(tmp_path):
    growing = Made("growing", {"model.kernels": [7, 23, 41]}, gain=0.05, minutes_to_10k=29)
    found = section(tmp_path / "a", [Made("base"), growing])
    row = found.entries[1].rows["val_stft"]
    low, high = row.verdict.interval
    base = row.mean - row.parts.mean
    lines = findings.log_entry(found, found.entries[1])
    assert lines[:4] == [
        "growing",
        "  kernels [41] → [7, 23, 41]",
        "  # params: 15.67M",
        "  took ~29 min to train 10k steps, 5.7 it/s, used 6.70 GiB of vram, "
        "12% of the time waiting for data",
    ]
    assert lines[4] == (
        f"  val_stft {row.mean:.4f} ± {row.seed_deviation:.4f}, {row.parts.mean:+.4f} "
        f"({low:+.4f} to {high:+.4f}) from the baseline's {base:.4f}, step 100"
    )
    assert lines[-2:] == ["  2 seeds, all finished", f"  -> {row.verdict.text}"]


def shared(found, *labels, alone=()):
    """Have these variants' trials share their GPU, but for some seeds."""
    for trial in found.results.trials.values():
        if trial.label in labels and trial.seed not in alone:
            path = Path(trial.url) / "run.json"
            info = json.loads(path.read_text())
            info["timing"] |= {"packed": True, "data_wait_share": 0.5}
            path.write_text(json.dumps(info))
    return findings.read(found.results.url)


def test_figures_of_a_shared_gpu_say_so(tmp_path):
    found = section(tmp_path / "a", [Made("base"), Made("b", {"optim.lr": 0.1})])
    assert findings.legend(found) == "10k steps: ~ extrapolated"
    found = shared(found, "b")
    log = "\n".join(findings.log_entry(found, found.entries[1]))
    assert "took (~40 min) to train 10k steps, 4.2 it/s on a shared GPU" in log
    assert "50% of the time waiting for data on a shared GPU" in log
    cells = {line.id: line.cells for line in findings.lines(found)}
    assert cells[found.entries[1].id]["wait"] == "50% on a shared GPU"
    assert cells[found.entries[0].id]["wait"] == "12%"
    said = "10k steps: ~ extrapolated; ( ) shared its GPU, not to be compared"
    assert findings.legend(found) == said
    assert f"\n\n{said}.\n" in text_of([found])
    assert said in page_of([found]).decode().partition("<script")[0]


def test_a_seed_that_had_its_gpu_alone_counts_before_those_that_shared_it(tmp_path):
    found = section(tmp_path / "a", [Made("base"), Made("b", {"optim.lr": 0.1})])
    found = shared(found, "b", alone=(1,))
    line = findings.lines(found)[1]
    assert line.cells["wait"] == "12%"
    assert line.cells["to_10k"] == "~40 min"
    assert "shared" not in "\n".join(findings.log_entry(found, found.entries[1]))


def test_where_no_time_is_marked_there_is_no_legend(tmp_path):
    found = section(tmp_path / "a", [Made("base")], steps=10_000, log_every=1000)
    assert findings.legend(found) == ""


def test_a_variant_without_a_verdict_has_none_in_the_log(tmp_path):
    found = section(tmp_path / "a", [Made("base", state="waiting"), Made("b", state="waiting")])
    for entry in found.entries:
        assert findings.log_entry(found, entry)[-1] == "  2 seeds, all waiting"


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("/home/me/my music/set", ".../my music/set"),
        ("/data/set", "/data/set"),
        ("s3://bucket/a/b/c", "s3://bucket/a/b/c"),
        ({"a": ["/home/me/x/y", 3, None]}, {"a": [".../x/y", 3, None]}),
    ],
)
def test_of_a_path_in_a_setting_only_the_end_is_told(setting, wanted):
    assert findings.ends(setting) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no room in /home/me/results/a/b.pt", "no room in .../a/b.pt"),
        ("No such file: '/mnt/disk/a/b.pt'\n  twice", "No such file: '.../a/b.pt' twice"),
        ("s3://bucket/results/a/b.pt is gone", "s3://bucket/results/a/b.pt is gone"),
        ("1/2 of a/b/c/d", "1/2 of a/b/c/d"),
    ],
)
def test_of_absolute_paths_only_the_end_is_told(text, wanted):
    assert findings.local(text) == wanted
