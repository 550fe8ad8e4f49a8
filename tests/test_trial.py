import copy
import errno
import io
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch import nn

from bgray import checkpoint, feed, shards, storage, trial
from bgray.build import build_task
from bgray.config import ConfigError, digest
from bgray.context import Context
from bgray.evaluation import Evaluator
from bgray.experiment import build_recipe, build_validation, prepare_data, resolve, run_url
from bgray.loop import NotFinite
from bgray.losses import LossSum
from bgray.records import CTRL_C, Superseded, evaluations, read_info, read_lines
from bgray.trial import run_trial

CURVES = ("metrics.jsonl", "validation_items.jsonl")


def at(raw, results, **sections):
    """The experiment with other results and changed sections."""
    raw = copy.deepcopy(raw)
    for section, changes in sections.items():
        raw[section] = {**raw.get(section, {}), **changes}
    raw["runtime"]["results"] = str(results)
    return resolve(raw, "test")


def train(experiment, **context):
    """Trains to the end or the first error; returns the run's folder."""
    run_trial(experiment, prepare_data(experiment), Context(**context))
    return run_url(experiment)


def stop_after(steps):
    """Context.stop that says yes at the `steps`-th question, one a step."""
    asked = itertools.count(1)
    return lambda: CTRL_C if next(asked) == steps else ""


def curves(url):
    return [storage.read_bytes(storage.join(url, name)) for name in CURVES]


def assert_same_weights(url, other):
    ours, theirs = checkpoint.load(url)["model"], checkpoint.load(other)["model"]
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# --- the same run


def test_the_same_experiment_in_two_folders_leaves_the_same_bytes(tiny, tmp_path):
    a, b = (train(at(tiny, tmp_path / name)) for name in "ab")
    assert curves(a) == curves(b)
    assert_same_weights(a, b)
    steps = [(line["step"], "val" in line) for line in read_lines(a + "/metrics.jsonl")]
    expected = [(s, v) for s in range(2, 25, 2) for v in (False, True) if s % 8 == 0 or not v]
    assert steps == expected


@pytest.mark.parametrize("optim", ["muon", "adamw", "psgd"])
@pytest.mark.parametrize("step", [5, 16], ids=["between log lines", "at an evaluation"])
def test_a_run_stopped_and_resumed_ends_with_the_unbroken_ones_bytes(tiny, tmp_path, optim, step):
    options = {"optim": {"name": optim}, "data": {"augment": [{"name": "gain"}]}}
    unbroken = train(at(tiny, tmp_path / "unbroken", **options))
    broken = at(tiny, tmp_path / "broken", **options)
    url = train(broken, stop=stop_after(step))
    info = read_info(url)
    assert (info["state"], info["step"]) == ("interrupted", step)
    assert checkpoint.load(url)["step"] == step
    assert curves(url) != curves(unbroken)
    train(broken)
    assert curves(url) == curves(unbroken)
    assert_same_weights(url, unbroken)
    info = read_info(url)
    assert (info["state"], info["step"], info["reason"]) == ("finished", 24, None)
    assert [attempt["from_step"] for attempt in info["attempts"]] == [0, step]


def test_a_run_whose_process_dies_again_and_again_at_one_step_is_given_up(tiny, tmp_path):
    experiment = at(tiny, tmp_path)
    url = train(experiment, stop=stop_after(8), session="s")
    path = storage.join(url, "run.json")
    info = read_info(url)
    dead = {key: value for key, value in info["attempts"][0].items() if key != "ended"}
    dead |= {"from_step": 8, "pid": 2**22 + 1}
    for session, state in (("s", "failed"), ("another", "finished")):
        info |= {"state": "running", "attempts": [dead] * 3}
        storage.write_bytes(path, json.dumps(info).encode())
        train(experiment, session=session)
        assert read_info(url)["state"] == state
        if session == "s":
            assert "died 3 times after step 8" in read_info(url)["reason"]


def dies_after(steps):
    """Context.stop in whose n-th question the process is gone: nothing is written any more."""
    asked = itertools.count(1)

    def stop():
        if next(asked) == steps:
            raise Superseded("kill -9")
        return ""

    return stop


def best_of(url):
    """(what its pointer says without the file's hash, the weights) of the best state."""
    name, _, _, score = storage.read_bytes(url + "/checkpoint/best").decode().split()
    return (name, score), checkpoint.load(url, which="best")["model"]


@pytest.mark.parametrize("every", [3, 8, 24], ids=lambda every: f"checkpoint_every {every}")
def test_the_best_state_is_that_of_the_unbroken_run_wherever_it_was_killed(tiny, tmp_path, every):
    options = {"optim": {"name": "muon", "lr": 0.05}, "runtime": {"checkpoint_every": every}}
    options["validation"] = {"every": 4}
    unbroken = train(at(tiny, tmp_path / "unbroken", **options))
    values = [m["val_stft"] for _, m in evaluations(unbroken)]
    step = 4 * (1 + int(np.argmin(values)))
    pointer, weights = best_of(unbroken)
    assert pointer == (f"step-{step:08d}.pt", f"val_stft={min(values)!r}")
    for kills in ((9,), (5, 5, 5, 5), (17, 2, 3)):
        broken = at(tiny, tmp_path / "-".join(map(str, kills)), **options)
        for number, after in enumerate(kills):
            with pytest.raises(Superseded):
                train(broken, stop=dies_after(after), session=str(number))
        url = train(broken)
        found, ours = best_of(url)
        assert found == pointer
        assert all(torch.equal(weights[name], tensor) for name, tensor in ours.items())
        assert curves(url) == curves(unbroken)
        states = [name for name in storage.listdir(url + "/checkpoint") if name.endswith(".pt")]
        assert len(states) <= 2


def test_where_the_best_state_is_gone_the_next_evaluated_one_takes_its_place(tiny, tmp_path):
    experiment = at(tiny, tmp_path, optim={"lr": 1e-30})  # nothing later is better
    url = train(experiment, stop=stop_after(11))
    assert best_of(url)[0][0] == "step-00000008.pt"
    for name in ("best", "step-00000008.pt"):  # as an older version left it
        Path(url, "checkpoint", name).unlink()
    train(experiment, stop=stop_after(2))
    assert not Path(url, "checkpoint/best").exists()
    train(experiment, stop=stop_after(7))  # at step 20
    assert best_of(url)[0][0] == "step-00000016.pt"
    train(experiment)
    assert best_of(url)[0][0] == "step-00000016.pt"
    assert checkpoint.load(url)["step"] == 24


def test_a_run_on_s3_stopped_and_resumed_has_the_bytes_of_one_on_disk(tiny, tmp_path, s3):
    unbroken = train(at(tiny, tmp_path))
    broken = at(tiny, s3 + "/results")
    url = train(broken, stop=stop_after(9))
    assert url.startswith("s3://bgray-test/results/tiny/")
    train(broken)
    assert curves(url) == curves(unbroken)
    assert_same_weights(url, unbroken)
    clips = storage.listdir(storage.join(url, "clips"))
    assert clips == storage.listdir(storage.join(unbroken, "clips"))


def test_shards_on_s3_give_the_run_that_local_ones_give(tiny, tmp_path, s3):
    local = tiny["data"]["path"]
    for name in storage.listdir(local):
        storage.write_bytes(f"{s3}/shards/{name}", storage.read_bytes(f"{local}/{name}"))
    there = at(tiny, tmp_path / "there", data={"path": f"{s3}/shards"})
    assert curves(train(there)) == curves(train(at(tiny, tmp_path / "here")))


@pytest.mark.slow  # two processes that import torch and Ray
def test_a_killed_run_started_again_has_the_curve_of_an_unbroken_one(tiny, tmp_path):
    options = {"train": {"steps": 120}, "validation": {"every": 40}}
    broken = at(tiny, tmp_path / "broken", **options)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(broken.resolved()))
    command = [sys.executable, "-m", "bgray.train", str(file), "--local"]
    metrics = Path(run_url(broken), "metrics.jsonl")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        while process.poll() is None and len(read_lines(str(metrics))) < 12:
            time.sleep(0.002)
        assert process.poll() is None, process.stdout.read().decode()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert read_info(run_url(broken))["state"] == "running"
    assert checkpoint.load(run_url(broken))["step"] < 120
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    info = read_info(run_url(broken))
    assert info["state"] == "finished"
    assert info["attempts"][1]["from_step"] >= 20
    assert curves(run_url(broken)) == curves(train(at(tiny, tmp_path / "unbroken", **options)))


def test_a_finished_run_started_again_trains_nothing_and_keeps_its_bytes(tiny, tmp_path):
    experiment = at(tiny, tmp_path)
    url = train(experiment)
    before, weights = curves(url), checkpoint.load(url)["model"]
    reports = []
    train(experiment, report=lambda step, metrics: reports.append(step))
    assert curves(url) == before
    assert reports == [8, 16, 24]  # retold to the scheduler
    assert all(torch.equal(weights[n], t) for n, t in checkpoint.load(url)["model"].items())
    assert read_info(url)["state"] == "finished"


def test_the_scheduler_hears_of_earlier_evaluations_again_before_the_new_ones(tiny, tmp_path):
    experiment = at(tiny, tmp_path)
    heard = []
    train(experiment, stop=stop_after(17), report=lambda step, m: heard.append((step, m)))
    again = []
    url = train(experiment, report=lambda step, m: again.append((step, m)))
    assert [step for step, _ in heard] == [8, 16]
    # Marked, so that ASHA fills its rungs and does not judge them a second time.
    assert again[:2] == [(step, {**m, "replayed": True}) for step, m in heard]
    assert [step for step, _ in again] == [8, 16, 24]
    lines = [line for line in read_lines(url + "/metrics.jsonl") if "val" in line]
    said = [{k: v for k, v in m.items() if k != "replayed"} for _, m in again]
    assert said == [{"step": line["step"], **line["val"]} for line in lines]


# --- how it ends


class Explodes(LossSum):
    """The experiment's loss, NaN from the n-th call on."""

    def __init__(self, loss, call):
        super().__init__({"l1": (nn.L1Loss(), 1.0)})
        self.loss, self.left = loss, call

    def forward(self, estimate, target, extras=None):
        self.left -= 1
        total, parts = self.loss(estimate, target, extras)
        return total * (math.nan if self.left <= 0 else 1.0), parts


def test_a_loss_that_is_not_finite_ends_as_diverged_at_its_step(tiny, tmp_path, monkeypatch):
    build = trial.build_loss
    monkeypatch.setattr(trial, "build_loss", lambda experiment: Explodes(build(experiment), 11))
    experiment = at(tiny, tmp_path)
    with pytest.raises(NotFinite, match="at step 11 "):
        train(experiment)
    info = read_info(run_url(experiment))
    assert (info["state"], info["step"]) == ("diverged", 11)
    assert "step 11 (batch 10 of seed 0)" in info["reason"]
    assert info["metrics"]["step"] == 8
    assert info["converged"] is False
    # On the CPU it is seen at once, and a state that came before it stays.
    assert checkpoint.load(run_url(experiment))["step"] == 8


def test_of_a_batch_that_made_the_loss_explode_there_is_all_to_make_it_again(
    tiny, tmp_path, monkeypatch
):
    build = trial.build_loss
    monkeypatch.setattr(trial, "build_loss", lambda experiment: Explodes(build(experiment), 11))
    experiment = at(tiny, tmp_path, train={"grad_clip": 1000.0}, optim={"lr": 0.003})
    with pytest.raises(NotFinite):
        train(experiment)
    text = Path(run_url(experiment), "diverged.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["step"], found["batch"], found["seed"], found["unit"]) == (11, 10, 0, 2)
    assert found["not_finite"] == ["grad_norm", "loss"]
    (values,) = found["values"]
    assert (values["loss"], values["grad_norm"]) == ("nan", "nan")
    assert 0 < values["loss_l1"] < 1
    assert values["lr_0"] == pytest.approx(0.003)
    # Cut again from the shards, by what is in the file alone.
    batch = next(feed.in_process(build_recipe(experiment, prepare_data(experiment)), 10, 11))
    for row, x in zip(found["rows"], batch.inputs, strict=True):
        crop = next(crop for crop in row["crops"] if crop["voice"] == "shift_12")
        rows = shards.read_row_group(found["shards"], crop["shard"], crop["row_group"])
        whole = shards.decode_voice(rows[crop["row_in_group"]], crop["voice"])
        np.testing.assert_array_equal(whole[:, crop["start"] :][:, : crop["frames"]], x)


def test_a_batch_that_cannot_be_read_any_more_does_not_hide_that_the_run_diverged(
    tiny, tmp_path, monkeypatch
):
    def unreadable(*_):
        raise ConfigError("train-00000.parquet", [("", "cannot be read")])

    build = trial.build_loss
    monkeypatch.setattr(trial, "build_loss", lambda experiment: Explodes(build(experiment), 2))
    monkeypatch.setattr("bgray.logbook.identify", unreadable)
    experiment = at(tiny, tmp_path)
    with pytest.raises(NotFinite):
        train(experiment)
    found = json.loads(Path(run_url(experiment), "diverged.json").read_text())
    assert found["rows_unreadable"] == "train-00000.parquet: cannot be read"
    assert read_info(run_url(experiment))["state"] == "diverged"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=["torch", "a neighbour has it", "cublas"],
)
def test_too_little_gpu_memory_is_a_result_that_says_how_far_it_came(
    tiny, tmp_path, monkeypatch, error
):
    def until(*args, **options):
        options["stop"] = dies_with
        return fit(*args, **options)

    def dies_with():
        if next(steps) == 13:
            raise error
        return ""

    fit, steps = trial.fit, itertools.count(1)
    monkeypatch.setattr(trial, "fit", until)
    experiment = at(tiny, tmp_path)
    prepared = prepare_data(experiment)
    trial.run_to_its_end(experiment, prepared, Context(packed=True, vram_gib=3.5))
    info = read_info(run_url(experiment))
    assert (info["state"], info["oom"]["step"], info["oom"]["limit_gib"]) == (
        "out_of_memory",
        13,
        3.5,
    )
    assert info["oom"]["asked_gib"] == (2.5 if "Tried" in str(error) else None)
    assert info["converged"] is None
    assert (info["packed"], info["vram_limit_gib"], info["timing"]["packed"]) == (True, 3.5, True)
    assert read_lines(run_url(experiment) + "/timing.jsonl")[-1]["packed"] is True
    monkeypatch.undo()
    info = read_info(train(experiment))
    assert (info["state"], info["packed"], info["oom"]["step"]) == ("finished", False, 13)
    assert [a["ended"] for a in info["attempts"]] == ["out_of_memory", "finished"]
    assert "packed" not in read_lines(run_url(experiment) + "/timing.jsonl")[-1]


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (SystemExit(), "stopped", "pruned by ASHA"),
        (KeyboardInterrupt(), "interrupted", "Ctrl-C"),
        (ZeroDivisionError("odd"), "failed", "ZeroDivisionError: odd"),
        (torch.cuda.OutOfMemoryError("much"), "out_of_memory", "lower train.batch_size"),
    ],
)
def test_what_ends_a_run_early_is_its_state_and_reason(tiny, tmp_path, error, state, said):
    def report(step, metrics):
        raise error

    experiment = at(tiny, tmp_path)
    with pytest.raises(type(error)):
        train(experiment, report=report)
    info = read_info(run_url(experiment))
    assert info["state"] == state
    assert said in info["reason"]
    assert info["metrics"]["step"] == 8
    assert info["timing"]["steps_per_second"] > 0


def test_out_of_memory_and_divergence_are_results_for_ray_but_other_errors_are_not(
    tiny, tmp_path, monkeypatch
):
    experiment = at(tiny, tmp_path)
    for error in (NotFinite(1, 0), torch.cuda.OutOfMemoryError("much"), OSError("disk")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(trial, "run_trial", fails)
        if isinstance(error, OSError):
            with pytest.raises(OSError, match="disk"):
                trial.run_to_its_end(experiment, None, Context())
        else:
            trial.run_to_its_end(experiment, None, Context())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_the_run_can_go_on(
    tiny, tmp_path, monkeypatch
):
    experiment = at(tiny, tmp_path / "full")
    write, checkpoints = storage.write_bytes, itertools.count(1)

    def full(url, content):
        if url.endswith(".pt") and next(checkpoints) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device", url)
        write(url, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(experiment)
    url = run_url(experiment)
    info = read_info(url)
    assert info["state"] == "failed"
    assert "No space left on device" in info["reason"]
    assert checkpoint.load(url)["step"] == 8
    monkeypatch.undo()
    train(experiment)
    assert read_info(url)["attempts"][1]["from_step"] == 8
    assert curves(url) == curves(train(at(tiny, tmp_path / "unbroken")))


def test_a_disk_too_full_even_for_the_record_reports_the_first_error(tiny, tmp_path, monkeypatch):
    experiment = at(tiny, tmp_path / "full")
    write, is_full = storage.write_bytes, []

    def full(url, content):
        if is_full or (url.endswith("step-00000008.pt") and not is_full.append(True)):
            raise OSError(errno.ENOSPC, "No space left on device", url)
        write(url, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        train(experiment)
    assert caught.value.filename.endswith("step-00000008.pt")
    assert checkpoint.load(run_url(experiment))["step"] == 4
    monkeypatch.undo()
    train(experiment)
    assert curves(run_url(experiment)) == curves(train(at(tiny, tmp_path / "unbroken")))


def test_a_stalled_feed_is_named_in_the_record_with_the_way_out(tiny, tmp_path, monkeypatch):
    in_process, said, warned = feed.in_process, threading.Event(), []

    def slow(*args, **options):
        said.wait()
        yield from in_process(*args, **options)

    monkeypatch.setattr(feed, "in_process", slow)
    experiment = at(tiny, tmp_path, runtime={"stall_seconds": 0.02})
    url = train(experiment, warn=lambda text: (warned.append(text), said.set()))
    assert warned[0].startswith("no batch for 0 s: a work unit takes longer than that")
    assert read_info(url)["warnings"][0] == warned[0]
    assert read_info(url)["state"] == "finished"


# --- what is in the folder


def test_run_json_says_what_ran_on_which_data_and_what_doing_nothing_scores(tiny, tmp_path):
    experiment = at(tiny, tmp_path)
    prepared = prepare_data(experiment)
    url = train(experiment)
    info = read_info(url)
    assert url == f"{tmp_path}/tiny/{info['id']}"
    assert info["data_hash"] == info["manifest_hash"] == prepared.manifest.hash
    assert info["parameters"] == sum(t.numel() for t in checkpoint.load(url)["model"].values())
    (attempt,) = info["attempts"]
    here = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert attempt["commit"] == here.stdout.strip()
    assert attempt["packages"]["torch"] == version("torch")
    assert (info["seed"], info["device"], info["workers"], info["feed"]) == (0, "cpu", 1, "process")
    other_seed = at(tiny, tmp_path, train={"seed": 5})
    assert info["variant"] == other_seed.variant_identity(prepared.manifest.hash)
    listing = json.loads(
        Path(tmp_path, "tiny", f"validation-{info['validation']}.json").read_text()
    )
    assert digest(listing)[:12] == info["validation"]
    assert listing["data"] == prepared.manifest.hash
    assert len(listing["items"]) == info["validation_items"] == 3
    assert yaml.safe_load(Path(url, "experiment.yaml").read_text()) == experiment.resolved()


def test_the_baseline_is_the_score_of_the_input_itself(tiny, tmp_path):
    experiment = at(tiny, tmp_path)
    info = read_info(train(experiment))
    validation = build_validation(experiment, prepare_data(experiment))
    score = build_task(experiment).scorer(8000)
    found = [
        score(torch.tensor(x / 32768).float()[None, None], torch.tensor(y / 32768).float()[None])
        for _, x, y in validation.load()
    ]
    for name in ("val_stft", "val_si_sdr"):
        items = [float(scores[name]) for scores in found]
        assert info["baseline_items"][name] == pytest.approx(items, abs=1e-5)
        assert info["baseline"][name] == pytest.approx(np.mean(items), abs=1e-5)
    assert info["baseline"]["val_si_sdr"] < -10  # an octave away from the original


def test_the_reported_mean_is_that_of_every_item(tiny, tmp_path):
    url = train(at(tiny, tmp_path))
    lines = [line for line in read_lines(url + "/metrics.jsonl") if "val" in line]
    items = read_lines(url + "/validation_items.jsonl")
    assert [line["step"] for line in items] == [8, 16, 24]
    for line, scores in zip(lines, items, strict=True):
        for name, mean in line["val"].items():
            assert len(scores[name]) == 3
            assert mean == pytest.approx(np.mean(scores[name]), rel=1e-6)


def test_clips_are_the_crops_and_an_estimate_at_each_evaluation(tiny, tmp_path):
    experiment = at(tiny, tmp_path, validation={"clips": 2})
    url = train(experiment)
    kinds = ("input", "step-000008", "step-000016", "step-000024", "target")
    assert storage.listdir(url + "/clips") == [f"{i:03d}-{k}.wav" for i in (0, 1) for k in kinds]
    rows = shards.read_row_group(tiny["data"]["path"], "validation-00000.parquet", 0)
    rows.sort(key=lambda row: row.key)
    for i, row in enumerate(rows[:2]):
        for kind, voice in (("target", "audio"), ("input", "shift_12")):
            whole = shards.decode_flac(row.voices[voice])[0]
            start = (len(whole) - 4096) // 2
            found, rate = soundfile.read(f"{url}/clips/{i:03d}-{kind}.wav", dtype="int16")
            assert rate == 8000
            np.testing.assert_array_equal(found, whole[start : start + 4096])
    estimate, _ = soundfile.read(f"{url}/clips/000-step-000024.wav")
    assert len(estimate) == 4096
    assert np.abs(estimate).max() > 0


def test_an_estimate_louder_than_full_scale_is_clipped_in_its_clip_not_rescaled(
    tiny, tmp_path, monkeypatch
):
    found = {}
    monkeypatch.setattr(storage, "write_bytes", lambda url, content: found.update({url: content}))
    experiment = at(tiny, tmp_path)
    url = run_url(experiment)
    evaluator = Evaluator(experiment, prepare_data(experiment), Context(), url)
    evaluator._clip("000-loud", np.array([[[2.0, -2.0, 0.5]]], np.float32))
    (content,) = found.values()
    audio, _ = soundfile.read(io.BytesIO(content), dtype="int16")
    assert audio.tolist() == [32767, -32768, 16384]


def test_a_folder_of_the_same_id_but_another_config_is_refused(tiny, tmp_path):
    experiment = at(tiny, tmp_path)
    url = train(experiment, stop=stop_after(3))
    changed = {**experiment.resolved(), "schedule": {"name": "cosine"}}
    Path(url, "experiment.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ConfigError, match="schedule.name: 'cosine' there, 'constant' now"):
        train(experiment)


# --- more workers


def worker(rank, world, experiment, port):
    warnings.simplefilter("error", FutureWarning)  # pytest's filters do not reach this process
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        train(experiment, rank=rank, world=world)
        torch.distributed.barrier()  # gloo's threads may abort where the other rank has gone
    finally:
        torch.distributed.destroy_process_group()


def exploding_worker(rank, world, experiment, port):
    build = trial.build_loss
    trial.build_loss = lambda e: Explodes(build(e), 7) if rank == 1 else build(e)
    try:
        worker(rank, world, experiment, port)
    except NotFinite:
        return
    raise AssertionError("it went on")


@pytest.mark.slow  # two processes that import torch and Ray
def test_a_loss_that_explodes_on_another_rank_ends_all_of_them_and_rank_0_says_where(
    tiny, tmp_path
):
    # Without the gradient's norm, which is NaN everywhere, only rank 1 knows at step 7.
    experiment = at(tiny, tmp_path, train={"grad_clip": None}, optim={"name": "adamw"})
    torch.multiprocessing.spawn(exploding_worker, (2, experiment, free_port()), nprocs=2)
    info = read_info(run_url(experiment))
    assert (info["state"], info["step"]) == ("diverged", 7)
    found = json.loads(Path(run_url(experiment), "diverged.json").read_text())
    (values,) = found["values"]  # of the rank that met it
    assert values["loss"] == "nan"
    assert [row["rank"] for row in found["rows"]] == [0, 0, 1, 1]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.slow  # two processes that import torch and Ray
def test_two_workers_follow_the_curve_of_one_at_the_same_global_batch(tiny, tmp_path):
    options = {"optim": {"name": "adamw"}, "validation": {"items": 3, "clips": 2}}
    one = train(at(tiny, tmp_path / "one", **options))
    two = at(tiny, tmp_path / "two", **options)
    torch.multiprocessing.spawn(worker, (2, two, free_port()), nprocs=2)
    two = run_url(two)
    # The gradient is summed in another order, so its last bits differ; AdamW divides by its size
    # and passes such differences on where a gradient is nearly 0: rel 1e-6 of float32 at the first
    # line, growing over 24 steps.
    ours, theirs = (read_lines(url + "/metrics.jsonl") for url in (two, one))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.get("val", a).items():
            assert value == pytest.approx(b.get("val", b)[name], rel=1e-4), (a["step"], name)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert read_info(two)["workers"] == 2
    assert read_info(two)["baseline_items"] == read_info(one)["baseline_items"]
    for line in read_lines(two + "/validation_items.jsonl"):
        assert [len(line[name]) for name in ("val_stft", "val_si_sdr")] == [3, 3]
    assert storage.listdir(two + "/clips") == storage.listdir(one + "/clips")
