"""The whole line, as a user runs it: each test is one or two commands in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_tensorboard import shown_as_they_are

from bgray.records import read_info, read_lines, runs
from bgray.search import expand

pytestmark = [pytest.mark.ray, pytest.mark.alone]


def command(path, *overrides):
    sets = [word for item in overrides for word in ("--set", item)]
    return [sys.executable, "-m", "bgray.sweep", str(path), *sets]


def sweep(path, *overrides, code=0, timeout=400):
    done = subprocess.run(
        command(path, *overrides), capture_output=True, text=True, timeout=timeout, env=os.environ
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.fixture
def sweep_file(tiny, tmp_path):
    def write(**keys):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**tiny, "optim": {"name": "adamw", "lr": 1e-3}, **keys}))
        return path

    return write


@pytest.mark.slow
def test_a_sweep_prunes_reports_what_diverged_and_is_done_when_run_again(sweep_file, tmp_path):
    path = sweep_file(
        variants={
            "calm": {"optim.lr": 1e-6},
            "fast": {"optim.lr": 1e-2},
            "faster": {"optim.lr": 1e-1},
            "mad": {"optim.lr": 1e30},
        },
        asha={"grace_steps": 8, "reduction_factor": 2},
    )
    folder = str(tmp_path / "results" / "tiny")
    out = sweep(path, "runtime.concurrency=1")
    by_state = sorted(run.state for run in runs(folder))
    assert "diverged" in by_state
    assert "stopped" in by_state
    assert "finished" in by_state
    assert len(by_state) == 4
    assert "not finite at step" in out
    assert "unprocessed input" in out
    assert len(out.splitlines()) < 60, "Ray's own output got through"
    by_start = sorted(runs(folder), key=lambda run: run.info["attempts"][-1]["entered_at"])
    # One process for all of them.
    assert [run.info["attempts"][-1]["warm"] for run in by_start] == [False, True, True, True]
    assert len({run.info["attempts"][-1]["pid"] for run in by_start}) == 1
    (mad,) = [run for run in runs(folder) if run.state == "diverged"]
    assert "at step " in mad.info["reason"]
    assert f"tensorboard --logdir {folder}/.ray/tune" in out
    assert not Path(folder, ".ray", "session.json").exists()
    shown_as_they_are(folder)
    before = {run.id: run.info for run in runs(folder)}
    began = time.monotonic()
    again = sweep(path)
    assert {run.id: run.info for run in runs(folder)} == before
    assert "unprocessed input" in again
    assert f"bgray.dashboard {folder}" in again
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_trial_fed_by_ray_data_with_results_on_s3_equals_a_local_one(
    sweep_file, tmp_path, s3, monkeypatch
):
    path = sweep_file()
    sweep(path, f"runtime.results={s3}/results", "runtime.feed=ray")
    (remote,) = runs(f"{s3}/results/tiny")
    monkeypatch.setenv("S3_ENDPOINT", os.environ["AWS_ENDPOINT_URL"])
    shown_as_they_are(f"{s3}/results/tiny")
    assert remote.state == "finished"
    assert remote.info["feed"] == "ray"
    from bgray.train import main

    main([str(path), "--local"])
    (local,) = runs(str(tmp_path / "results" / "tiny"))
    assert local.id == remote.id
    for name in ("metrics.jsonl", "validation_items.jsonl"):
        assert read_lines(f"{remote.url}/{name}") == read_lines(f"{local.url}/{name}")


@pytest.mark.slow
def test_after_a_trial_that_failed_the_next_one_gets_a_new_process_and_says_why(
    sweep_file, tmp_path
):
    path = sweep_file(seeds=3)
    _, (first, *others) = expand(str(path))
    Path(first.url).mkdir(parents=True)
    Path(first.url, "experiment.yaml").write_text("name: another\n")
    sweep(path, "runtime.concurrency=1", code=1)
    assert read_info(first.url)["state"] == "failed"
    seen = [read_info(trial.url)["attempts"][-1] for trial in others]
    assert [attempt["warm"] for attempt in seen] == [False, True]
    assert seen[0]["why_new"] == "the trial before ended with ConfigError"
    assert "why_new" not in seen[1]
    assert seen[0]["pid"] == seen[1]["pid"]
    assert {run.state for run in runs(str(tmp_path / "results" / "tiny"))} == {
        "failed",
        "finished",
    }


@pytest.mark.slow
def test_trials_of_several_workers_run_train_inside_tune_and_are_pruned(sweep_file, tmp_path):
    path = sweep_file(
        variants={
            "fast": {"optim.lr": 1e-2},  # the baseline, which nobody stops
            "calm": {"optim.lr": 1e-6},
            "slow": {"optim.lr": 1e-3},
        },
        asha={"grace_steps": 50, "reduction_factor": 2},
    )
    # Long enough that the second trial is still at it when word of its rung has gone round.
    sets = ("runtime.workers=2", "runtime.checkpoint_every=500", "runtime.log_every=50")
    sweep(path, *sets, "train.steps=600", "validation.every=50", timeout=900)
    found = runs(str(tmp_path / "results" / "tiny"))
    assert sorted(run.state for run in found)[0] == "finished"
    assert {run.state for run in found} <= {"finished", "stopped"}
    assert "stopped" in {run.state for run in found}
    assert {run.info["workers"] for run in found} == {2}


@pytest.mark.slow
def test_ctrl_c_checkpoints_every_trial_and_the_same_command_goes_on(sweep_file, tmp_path):
    path = sweep_file(seeds=2)
    overrides = ("train.steps=4000", "validation.every=2000", "runtime.checkpoint_every=2000")
    process = subprocess.Popen(
        command(path, *overrides), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = tmp_path / "results" / "tiny"
    wait_for(lambda: list(folder.glob("*/timing.jsonl")), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on" in out
    stopped = [run for run in runs(str(folder)) if run.state == "interrupted"]
    assert stopped
    for run in stopped:
        assert run.info["step"] > 0
        assert (folder / run.id / "checkpoint" / "latest").exists()
