import dataclasses
import io

import pytest
from rich.console import Console
from test_agenda import Pretender, write_sweep

from bgray import summary
from bgray.agenda import Agenda
from bgray.compare import Comparison
from bgray.compare import Row as Compared
from bgray.config import Pick
from bgray.console import Board, Row
from bgray.search import expand
from bgray.verdicts import Parts, Verdict


def board_of(agenda):
    rows = [Row(t.id, t.label, t.url, t.experiment.train.steps) for t in agenda.trials.values()]
    for row in rows:
        row.refresh()
    console = Console(width=200, file=io.StringIO())
    return Board("tiny", rows, agenda.sweep.metric, console)


def said(board):
    return board.console.file.getvalue()


@pytest.fixture
def done(tmp_path, tiny):
    """An agenda whose trials have all run, by (name of the sweep, keys)."""

    def make(**keys):
        agenda = Agenda(*expand(write_sweep(tmp_path, tiny, **keys)))
        Pretender(agenda).all()
        agenda.write_manifest()
        return agenda

    return make


def test_what_has_run_before_is_named_with_its_score(done):
    agenda = done(names=["base", "good"])
    board = board_of(agenda)
    summary.say_what_is_done(agenda, board)
    assert "2 of 2 trials have run before" in said(board)
    assert "good seed 0: finished at step 16, val_stft 3.6250" in said(board)


def test_what_another_sweep_has_run_is_named_with_its_place(done, tmp_path, tiny):
    done(names=["base", "good"], name="one")
    agenda = Agenda(*expand(write_sweep(tmp_path, tiny, names=["base"], name="two")))
    board = board_of(agenda)
    summary.say_what_is_done(agenda, board)
    (line,) = said(board).splitlines()
    assert "base seed 0: finished at step 16" in line
    assert "/one/" in line


def test_trials_are_listed_by_how_far_they_came_and_then_by_score(done):
    agenda = done(asha={"grace_steps": 4, "reduction_factor": 2, "controls": 0})
    board = board_of(agenda)
    board.console.print(summary.trials_table(agenda, board))
    found = [name for line in said(board).splitlines() for name in NAMES if f" {name} " in line]
    assert found == ["good", "base", "fair", "poor", "bad"]


NAMES = ("base", "good", "fair", "poor", "bad")


def test_of_very_many_trials_only_those_that_went_wrong_are_listed(done, monkeypatch):
    monkeypatch.setattr(summary, "MOST_ROWS", 3)
    agenda = done()
    board = board_of(agenda)
    board.rows[1].info["state"] = "diverged"
    board.console.print(summary.trials_table(agenda, board))
    assert "1 of 5 trials did not end well" in said(board)
    assert " good " in said(board)
    assert " fair " not in said(board)


def test_rungs_say_how_far_they_can_be_trusted(done):
    keys = {"asha": {"grace_steps": 4, "reduction_factor": 2, "controls": 0.5}}
    lines = summary.trust_in_rungs(done(**keys))
    assert len(lines) == 2
    assert all("rank correlation with the end 1.00 (3 variants" in line for line in lines)


def commands(agenda, comparison=None):
    return [line.strip() for line in summary.what_comes_next(agenda, comparison)][1:]


def run_of(agenda, label, seed=0):
    return next(t for t in agenda.trials.values() if (t.label, t.seed) == (label, seed))


def compared(agenda, **said):
    """A comparison by whose order the variants come as they are named, the baseline first:
    (verdict, mean of the differences)."""
    ids = {trial.label: id for id, trial in agenda.variants.items()}
    rows = []
    for label, (kind, mean) in said.items():
        parts = Parts(mean, 2, 4, 0.1, 0.1, 0.1, (0.1, 0.1))
        judged = {} if kind is None else {"parts": parts, "verdict": Verdict(kind, "")}
        rows.append(Compared(ids[label], label, False, (0, 1), (0, 2), 0, 16, 5.0, 0.1, **judged))
    return Comparison("tiny", "val_stft", "min", "base", 0.95, 1, tuple(rows), None, None)


def test_the_closing_words_end_with_the_commands_that_come_next(done):
    agenda = done(names=["base", "good"])
    board = board_of(agenda)
    summary.close(agenda, board)
    best, folder = run_of(agenda, "good"), agenda.folder
    assert [line.strip() for line in said(board).splitlines()[-5:]] == [
        "What comes next:",
        f"uv run python -m bgray.dashboard {folder}",
        f"uv run python -m bgray.report {folder}",
        f"uv run python -m bgray.apply {best.url} in.wav --output out.wav  # good seed 0",
        f"uv run tensorboard --logdir {folder}/.ray/tune",
    ]


def test_the_command_that_applies_a_run_is_one(done, tmp_path, capsys):
    import shlex

    from bgray import apply

    agenda = done(names=["base", "good"], name="my sweep")
    words = shlex.split(commands(agenda)[2], comments=True)
    assert words[:4] == ["uv", "run", "python", "-m"]
    assert words[4] == "bgray.apply"
    with pytest.raises(SystemExit):  # its run has no checkpoint: it was only pretended
        apply.main(words[5:])
    assert f"{run_of(agenda, 'good').url}" in capsys.readouterr().err


def test_the_best_run_is_of_the_first_variant_that_is_better_by_the_comparison(done):
    agenda = done(seeds=2)

    def best(**said):
        trial = summary.best_run(agenda, compared(agenda, **said))
        return trial and (trial.label, trial.seed)

    base = {"base": (None, 0.0)}
    assert best(**base, good=("open", -2.0), fair=("better", -1.0)) == ("fair", 0)
    assert best(**base, fair=("open", -1.0), good=("open", -2.0)) == ("fair", 0)
    assert best(**base, fair=("worse", 1.0), poor=("open", 0.5)) == ("base", 0)
    assert best(**base, good=("unstable", -2.0)) == ("base", 0)


def test_the_best_run_is_one_that_has_finished(done):
    agenda = done(seeds=2)
    known = agenda.known[run_of(agenda, "fair").id]
    agenda.known[run_of(agenda, "fair").id] = dataclasses.replace(known, state="stopped")
    comparison = compared(agenda, base=(None, 0.0), fair=("better", -1.0))
    assert summary.best_run(agenda, comparison) is run_of(agenda, "fair", seed=1)
    for id, known in agenda.known.items():
        agenda.known[id] = dataclasses.replace(known, state="failed")
    assert summary.best_run(agenda, comparison) is None
    assert not [line for line in commands(agenda, comparison) if "bgray.apply" in line]


def test_a_separation_is_scored_on_whole_tracks(done):
    agenda = done(names=["base"])
    (id,) = agenda.trials
    trial = agenda.trials[id]
    task = Pick("separation", {"targets": ("vocals",)})
    experiment = dataclasses.replace(trial.experiment, task=task)
    agenda.trials[id] = dataclasses.replace(trial, experiment=experiment)
    assert commands(agenda)[2] == f"uv run python -m bgray.evaluate {trial.url}  # base seed 0"


def test_of_a_bucket_tensorboard_takes_one_package_more(done):
    agenda = done(names=["base"])
    agenda.folder = "s3://bucket/my sweep"
    assert commands(agenda)[3] == (
        "uv run --with boto3 tensorboard --logdir 's3://bucket/my sweep/.ray/tune'"
    )
