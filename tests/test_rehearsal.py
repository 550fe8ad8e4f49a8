"""What a run costs, against real runs."""

import os

import pytest
import torch

from bgray import checkpoint
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.rehearsal import cost_key, rehearse
from bgray.trial import run_trial


def test_seeds_rates_and_weights_cost_the_same_and_shapes_do_not(tiny):
    def key(path, value):
        raw = {**tiny, "optim": {"name": "muon"}, "loss": {"l1": 1.0}}
        section, _, name = path.partition(".")
        raw[section] = {**raw[section], name: value} if name else value
        return cost_key(resolve(raw, "f"))

    base = key("train.seed", 0)
    assert key("train.seed", 7) == base
    assert key("train.steps", 99) == base
    assert key("optim.lr", 1e-4) == base
    assert key("loss", {"l1": 3.0}) == base
    assert key("train.batch_size", 8) != base
    assert key("model", {**tiny["model"], "kernels": [23]}) != base
    assert key("loss", {"si_sdr": 1.0}) != base
    assert key("optim", {"name": "adamw"}) != base
    assert key("data", {**tiny["data"], "segment": 1024}) != base
    assert key("runtime", {**tiny["runtime"], "compile": True}) != base


def test_a_rehearsal_writes_nothing_and_measures_what_a_run_does(tiny, tmp_path):
    tiny["optim"] = {"name": "adamw"}
    experiment = resolve(tiny, "f")
    cost = rehearse(experiment, Context(), steps=5)
    assert not os.listdir(tmp_path)
    assert len(cost.step_seconds) == 5
    assert cost.batch == 4
    run_trial(experiment, prepare_data(experiment), Context())
    folder = run_url(experiment)
    name = checkpoint.storage.read_bytes(f"{folder}/checkpoint/latest").decode().split()[0]
    written = os.path.getsize(f"{folder}/checkpoint/{name}")
    assert cost.checkpoint_bytes == pytest.approx(written, rel=0.1)
    clips = [f"{folder}/clips/{name}" for name in os.listdir(f"{folder}/clips")]
    estimate = next(path for path in clips if "step-" in path)
    assert cost.clip_bytes == os.path.getsize(estimate)


def test_steps_in_lots_and_a_limit_of_time(tiny):
    experiment = resolve(tiny, "f")
    lots = rehearse(experiment, Context(), steps=6, each=3, whole=False)
    assert len(lots.step_seconds) == 2
    short = rehearse(experiment, Context(), warm_up=0, steps=1000, seconds=0.0, whole=False)
    assert len(short.step_seconds) == 1
    assert (short.checkpoint_bytes, short.item_seconds) == (0, 0)


def test_the_caller_hears_when_the_warm_up_is_over(tiny):
    heard = []
    experiment = resolve(tiny, "f")
    rehearse(experiment, Context(), steps=1, ready=lambda: heard.append(1), whole=False)
    assert heard == [1]


def test_a_rehearsal_does_not_move_the_weights_to_nan(tiny):
    """At a rate that would be the end of a run."""
    tiny["optim"] = {"name": "sgd", "lr": 1e6}
    cost = rehearse(resolve(tiny, "f"), Context(), steps=3, whole=False)
    assert len(cost.step_seconds) == 3


def test_models_that_learn_their_inputs_first_can_be_rehearsed(tiny):
    tiny["task"] = {"name": "separation"}
    tiny["data"] = {"sample_rate": 8000, "segment": 8192, "channels": 1}
    tiny["model"] = {"name": "open_unmix", "hidden": 16}
    tiny["validation"]["segment"] = 8192
    cost = rehearse(resolve(tiny, "f"), Context(), warm_up=1, steps=1)
    assert cost.item_seconds > 0


def test_threads_and_precision_are_those_of_a_run(tiny):
    before = torch.get_num_threads()
    try:
        rehearse(resolve(tiny, "f"), Context(threads=2), warm_up=1, steps=1, whole=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
