"""What a sweep is warned of before it starts."""

import copy

import pytest
import torch
import yaml

from bgray import cautions as module
from bgray.cautions import cautions
from bgray.search import expand, rungs


@pytest.fixture
def sweep_file(tiny, tmp_path):
    def write(**keys):
        path = tmp_path / "sweep.yaml"
        raw = copy.deepcopy(tiny)
        raw["model"] |= keys.pop("model", {})
        path.write_text(yaml.safe_dump({**raw, **keys}))
        return str(path)

    return write


def said(path, *overrides):
    return list(cautions(*expand(path, overrides)))


@pytest.mark.parametrize(("share", "starts"), [(0.1, 72), (0.2, 64), (0.5, 40)])
def test_a_rate_that_decays_before_the_last_rung(sweep_file, share, starts):
    path = sweep_file(
        schedule={"name": "wsd", "decay_share": share}, asha={"grace_steps": 8}, seeds=2
    )
    assert rungs(*expand(path, ("train.steps=80",))) == (8, 24, 72)
    found = said(path, "train.steps=80")
    assert len(found) == (starts < 72)
    assert all(f"decays from step {starts} on" in text for text in found)


# --- networks


def test_options_that_the_network_does_not_use(sweep_file):
    path = sweep_file(
        model={"blocks": [1, 1]},
        search={"model.kernels": [[7], [5], [7, 23], [7, 41]], "optim.lr": [1e-3, 1e-2]},
        seeds=2,
    )
    assert said(path) == [
        f"kernels=[7] {lr} and kernels=[7,23] {lr} and kernels=[7,41] {lr} are one and the same "
        "network: wav_unet does not use what differs between them, and their scores will be equal"
        for lr in ("optim.lr=0.001", "optim.lr=0.01")
    ]


def test_two_kinds_of_twins_in_one_sweep(sweep_file):
    path = sweep_file(
        model={"blocks": [1, 1]}, search={"model.kernels": [[7], [5], [7, 23], [5, 23]]}
    )
    assert [text.split(" are ")[0] for text in said(path)] == [
        "kernels=[7] and kernels=[7,23]",
        "kernels=[5] and kernels=[5,23]",
    ]


def test_networks_of_the_same_layers_that_compute_otherwise_are_two(sweep_file, monkeypatch):
    path = sweep_file(search={"model.output": ["direct", "difference"]})
    _, (one, other) = expand(path)
    assert module._plan(one.experiment) == module._plan(other.experiment)
    assert said(path) == []
    monkeypatch.setattr(module, "_outcome", lambda experiment: "")
    assert len(said(path)) == 1


def test_what_differs_beside_the_network_makes_two_variants(sweep_file):
    search = {"train.batch_size": [1, 2], "optim.lr": [1e-3, 1e-2], "data.segment": [64, 128]}
    assert said(sweep_file(search=search)) == []


def test_nothing_is_drawn_from_the_global_generator(sweep_file):
    path = sweep_file(model={"blocks": [1, 1]}, search={"model.kernels": [[7], [7, 23]]})
    state = torch.random.get_rng_state()
    assert len(said(path)) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
