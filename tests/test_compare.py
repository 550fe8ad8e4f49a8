import io
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from rich.console import Console

from bgray.compare import compare_sweep, main
from bgray.config import ConfigError
from bgray.variants import Run

ITEMS = 4


def write_run(folder, run_id, values, *, seed=0, metric="val_stft", lr=0.01, **info):
    """values: step to the mean score; items spread evenly around it, so that they have no part in
    the interval."""
    run = folder / run_id
    run.mkdir(parents=True)
    experiment = {
        "name": folder.name,
        "task": {"name": "unshift"},
        "model": {"name": "wav_unet"},
        "optim": {"name": "muon", "lr": lr},
        "data": {"path": "there"},
        "train": {"seed": seed, "steps": 100},
        "runtime": {"device": "cpu"},
    }
    (run / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    spread = np.linspace(-1, 1, ITEMS)
    lines = [
        {"step": step, metric: list(value + spread), "val_si_sdr": list(-value + spread)}
        for step, value in values.items()
    ]
    (run / "validation_items.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    facts = {
        "id": run_id,
        "state": "finished",
        "seed": seed,
        "validation": "abc",
        "data_hash": "d" * 12,
        "baseline": {metric: 7.5},
        "attempts": [{"started": f"2026-01-01T00:00:{len(list(folder.iterdir())):02d}Z"}],
        **info,
    }
    (run / "run.json").write_text(json.dumps(facts))
    return run


def write_sweep(folder, variants, *, listing=True, **facts):
    """variants: label to seed to {step: score}, or to (that, what else run.json says)."""
    table = {}
    for v, (label, seeds) in enumerate(variants.items()):
        runs = {}
        for seed, values in seeds.items():
            values, info = values if isinstance(values, tuple) else (values, {})
            run_id = f"f{v:05d}{seed:06d}"
            write_run(folder, run_id, values, seed=seed, lr=0.01 * (v + 1), **info)
            runs[str(seed)] = run_id
        table[f"{v:012d}"] = {"label": label, "control": False, "runs": runs}
    if listing:
        folder.mkdir(parents=True, exist_ok=True)
        raw = {
            "name": folder.name,
            "metric": "val_stft",
            "mode": "min",
            "baseline": f"{0:012d}",
            "rungs": [],
            "screening_seed": None,
            "variants": table,
            **facts,
        }
        (folder / "sweep.json").write_text(json.dumps(raw))
    return str(folder)


SEEDS = {0: 1.0, 1: 1.2, 2: 1.4}
"""Scores of the baseline: seeds differ much more than what is tested."""


def shifted(by, wobble=(0.0, 0.01, -0.01), step=100):
    return {s: {step: SEEDS[s] + by + wobble[s]} for s in SEEDS}


BASE = shifted(0, (0.01, 0.0, -0.01))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "mine"


def rows(comparison):
    return {row.label: row for row in comparison.rows}


def said(capsys, *argv):
    main([*argv])
    return " ".join(capsys.readouterr().out.split())


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- verdicts from folders


def test_a_sweeps_variants_are_judged_against_its_baseline_best_first(folder):
    url = write_sweep(
        folder,
        {
            "base": shifted(0, (0, 0, 0)),
            "worse": shifted(0.9),
            "same": shifted(0, (0, 0, 0)),
            "better": shifted(-0.9),
        },
    )
    found = compare_sweep(url)
    assert [row.label for row in found.rows] == ["base", "better", "same", "worse"]
    assert [row.verdict.kind for row in found.rows[1:]] == ["better", "same", "worse"]
    better = rows(found)["better"]
    assert better.parts.mean == pytest.approx(-0.9)
    assert (better.parts.seeds, better.parts.items, better.step) == (3, ITEMS, 100)
    # Between seeds 0.2 apart the difference wobbles by 0.01: 1 - 0.0001 / (0.04 + 0.0398..)
    assert found.removed > 0.99
    assert found.unprocessed == 7.5


def test_each_pair_is_compared_at_the_last_step_that_all_their_seeds_reached(folder):
    short = shifted(-5, step=50)
    base = {s: {50: SEEDS[s], 100: SEEDS[s] - 0.5} for s in SEEDS}
    long = {s: {50: SEEDS[s] + 9, 100: SEEDS[s] - 0.5} for s in SEEDS}
    found = rows(compare_sweep(write_sweep(folder, {"base": base, "short": short, "long": long})))
    assert (found["short"].step, found["long"].step, found["base"].step) == (50, 100, 100)
    assert found["short"].parts.mean == pytest.approx(-5)
    assert found["long"].verdict.kind == "same"


def test_a_variant_with_fewer_seeds_meets_the_baselines_same_seeds_only(folder):
    one = {2: {100: SEEDS[2] - 0.05}}
    found = rows(compare_sweep(write_sweep(folder, {"base": BASE, "one": one})))
    assert found["one"].seeds == (2,)
    assert found["one"].parts.mean == pytest.approx(-0.05 + 0.01)
    assert found["one"].verdict.interval is None


def test_one_lucky_seed_does_not_rank_before_what_three_seeds_have_shown(folder):
    survivors = {**shifted(-9), 1: (shifted(-9)[1], {"state": "diverged"})}
    variants = {"base": BASE, "lucky": {0: {100: -9.0}}, "left": survivors, "solid": shifted(-0.5)}
    found = compare_sweep(write_sweep(folder, variants))
    assert [row.label for row in found.rows] == ["base", "solid", "left", "lucky"]
    assert rows(found)["lucky"].verdict.text.startswith("one seed: about")


def test_a_seed_that_diverged_forbids_better(folder):
    good = shifted(-0.9)
    good[1] = (good[1], {"state": "diverged"})
    found = rows(compare_sweep(write_sweep(folder, {"base": BASE, "good": good})))
    assert found["good"].verdict.text == "unstable: 1 of 3 seeds diverged"
    assert found["good"].seeds == (0, 2)


def test_a_seed_that_got_nowhere_is_counted_and_so_is_its_score(folder):
    good = shifted(-0.9)
    good[1] = (good[1], {"converged": False})
    compared = compare_sweep(write_sweep(folder, {"base": BASE, "good": good}))
    assert rows(compared)["good"].seeds == (0, 1, 2)
    assert rows(compared)["good"].unconverged == 1
    console = Console(width=160, file=io.StringIO())
    console.print(compared.table())
    assert "3 (1 did not converge)" in console.file.getvalue()


def test_who_was_chosen_by_a_screening_is_judged_on_fresh_seeds(folder):
    chosen = {**shifted(0.0), 0: {100: -99.0}}
    screened = {0: {100: 1.5}}
    url = write_sweep(
        folder, {"base": BASE, "chosen": chosen, "screened": screened}, screening_seed=0
    )
    found = rows(compare_sweep(url))
    assert found["chosen"].seeds == (1, 2)
    assert found["screened"].seeds == (0,)


def test_a_seed_that_has_just_begun_does_not_pull_the_others_back(folder):
    base = {s: {10: 9.0, 100: SEEDS[s]} for s in SEEDS}
    other = {s: {10: 9.0, 100: SEEDS[s] - 0.5} for s in (0, 1)}
    other[2] = ({10: 9.0}, {"state": "running"})
    found = rows(compare_sweep(write_sweep(folder, {"base": base, "other": other})))
    assert (found["other"].step, found["other"].seeds) == (100, (0, 1))


def test_a_sweep_is_comparable_while_some_of_its_runs_have_not_begun(folder):
    url = write_sweep(folder, {"base": BASE, "ready": shifted(-0.9), "waiting": {}})
    found = rows(compare_sweep(url))
    assert found["ready"].verdict.kind == "better"
    assert found["waiting"].verdict.text == "no common score yet"
    empty = write_sweep(folder.with_name("empty"), {"base": {}, "other": {}})
    with pytest.raises(ConfigError, match="no run has been evaluated yet"):
        compare_sweep(empty)


def test_without_a_common_seed_the_comparison_is_unpaired_and_says_so(folder, capsys):
    other = {seed + 10: values for seed, values in shifted(-9).items()}
    url = write_sweep(folder, {"base": BASE, "other": other})
    assert rows(compare_sweep(url))["other"].parts.other_seeds == 3
    assert "3 + 3 unpaired" in said(capsys, url)


# --- what may be named


def test_without_sweep_json_runs_that_differ_in_their_seed_are_one_variant(folder):
    url = write_sweep(folder, {"a": shifted(0), "b": shifted(-0.9)}, listing=False)
    found = compare_sweep(url)
    assert [row.label for row in found.rows] == ["optim.lr=0.01", "optim.lr=0.02"]
    assert [len(row.seeds) for row in found.rows] == [3, 3]
    assert (found.metric, found.mode) == ("val_stft", "min")


def test_runs_and_variants_are_named_by_folder_and_the_first_is_the_baseline(folder, capsys):
    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9), "c": shifted(0)}, baseline="gone")
    out = json.loads(run_json(capsys, f"{url}/c", f"{url}/{1:012d}"))
    assert [row["label"] for row in out["rows"]] == ["c", "b"]
    single = json.loads(run_json(capsys, f"{url}/f{1:05d}{0:06d}", f"{url}/f{2:05d}{0:06d}"))
    assert [row["label"] for row in single["rows"]] == ["b", "c"]
    assert single["rows"][1]["verdict"]["interval"] is None


def run_json(capsys, *argv):
    main([*argv, "--json"])
    return capsys.readouterr().out


def test_the_sweeps_baseline_comes_first_unless_another_is_asked_for(folder, capsys):
    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9), "c": shifted(0.1)})
    assert json.loads(run_json(capsys, f"{url}/b", f"{url}/base"))["baseline"] == "base"
    assert json.loads(run_json(capsys, url, "--baseline", "c"))["baseline"] == "c"
    away = json.loads(run_json(capsys, f"{url}/b", "--baseline", f"{url}/c"))
    assert [row["label"] for row in away["rows"]] == ["c", "b"]
    assert "did you mean 'base'?" in refused(capsys, url, "--baseline", "bsae")


def test_json_holds_what_the_table_rounds(folder, capsys):
    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9)})
    found = compare_sweep(url)
    out = json.loads(run_json(capsys, url))
    row = out["rows"][1]
    assert row["parts"]["mean"] == found.rows[1].parts.mean
    assert tuple(row["verdict"]["interval"]) == found.rows[1].verdict.interval
    assert row["verdict"]["kind"] == "better"
    assert (out["comparisons"], out["removed"]) == (1, found.removed)
    assert row["bootstrap_standard_error"] < row["verdict"]["standard_error"]


def test_another_metric_has_its_own_direction_and_an_unknown_one_is_refused(folder, capsys):
    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9)})
    out = json.loads(run_json(capsys, url, "--metric", "val_si_sdr"))
    assert (out["mode"], out["rows"][1]["verdict"]["kind"]) == ("max", "better")
    assert "did you mean 'val_stft'?" in refused(capsys, url, "--metric", "val_sftf")


def test_the_step_can_be_chosen_and_must_have_been_evaluated(folder, capsys):
    base = {s: {50: SEEDS[s], 100: SEEDS[s]} for s in SEEDS}
    url = write_sweep(folder, {"base": base, "b": base})
    assert json.loads(run_json(capsys, url, "--at", "50"))["rows"][1]["step"] == 50
    assert "evaluated at step 60; runs were at 50, 100" in refused(capsys, url, "--at", "60")


def test_runs_that_never_were_at_one_step_are_refused(folder, capsys):
    url = write_sweep(folder, {"base": shifted(0, step=30), "b": shifted(0, step=40)})
    assert "runs were at 30, 40" in refused(capsys, url)


def test_different_validation_sets_are_refused_with_their_runs(folder, capsys):
    other = {s: (v, {"validation": "xyz"}) for s, v in shifted(0).items()}
    url = write_sweep(folder, {"base": BASE, "b": other})
    text = refused(capsys, url)
    assert "different sets: abc" in text
    assert f"xyz (f{1:05d}{0:06d}, 3 in all)" in text


def test_what_is_no_run_and_no_sweep_is_refused(folder, capsys, tmp_path):
    assert "is no run, no sweep's folder" in refused(capsys, str(tmp_path / "nowhere"))
    url = write_sweep(folder, {"base": BASE, "wide": shifted(0)})
    assert "did you mean 'wide'?" in refused(capsys, f"{url}/wdie")
    assert "--level: must be between 0 and 1" in refused(capsys, url, "--level", "95")
    assert "--looks: must be at least 1" in refused(capsys, url, "--looks", "0")


@pytest.mark.parametrize("content", ["", "- 1", "a: [1", "name: another"])
def test_a_run_whose_experiment_is_damaged_is_named(folder, capsys, content):
    runs = [write_run(folder, f"{number:012d}", {100: 1.0}) for number in (1, 2)]
    (runs[1] / "experiment.yaml").write_text(content)
    text = refused(capsys, *map(str, runs))
    assert text.startswith(f"error: {runs[1]}/experiment.yaml:\n  is damaged (")


# --- the table


def test_the_table_says_how_and_fits_a_pipe(folder, capsys):
    many = {"base": BASE, "x" * 60: shifted(-0.9), "[odd] label": shifted(0.02, (1, 0, -1))}
    url = write_sweep(folder, many)
    main([url])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 160
    text = " ".join(out.split())
    assert "simultaneous 95% intervals (Bonferroni over 2 comparisons)" in text
    assert "paired over 3 seeds x 4 items" in text
    assert "of the variance" in text
    assert "[odd] label" in text
    assert "unprocessed input" in text
    assert "can't tell yet" in text


def test_more_looks_make_intervals_wider(folder, capsys):
    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9)})
    wide, narrow = (compare_sweep(url, looks=n).rows[1].verdict.interval for n in (3, 1))
    assert wide[0] < narrow[0]
    assert wide[1] > narrow[1]
    assert "look 3" in said(capsys, url, "--looks", "3")


def test_comparing_folders_on_s3_gives_what_the_local_ones_give(folder, s3):
    import s3fs

    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9)})
    s3fs.S3FileSystem().put(url, f"{s3}/mine", recursive=True)
    assert compare_sweep(f"{s3}/mine").to_json() == compare_sweep(url).to_json()


def test_a_sweep_is_compared_without_torch_or_ray(folder):
    url = write_sweep(folder, {"base": BASE, "b": shifted(-0.9)})
    code = "import sys; from bgray.compare import compare_sweep; compare_sweep(sys.argv[1]); "
    code += "print({'torch', 'ray'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stderr


def test_a_runs_scores_are_looked_through_once_for_the_steps_of_a_metric(tmp_path):
    class Counted(dict):
        looks = 0

        def items(self):
            self.looks += 1
            return super().items()

    run = Run(str(tmp_path), {})
    scores = Counted({100: {"a": [None, 1.0], "b": [None]}, 200: {"a": [2.0]}})
    run.__dict__["scores"] = scores
    assert [run.steps("a"), run.steps("a"), run.steps("b"), run.steps("b")] == [{100, 200}] * 2 + [
        set()
    ] * 2
    assert scores.looks == 2
