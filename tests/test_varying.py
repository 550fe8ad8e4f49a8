import dataclasses

import pytest
import yaml

from bgray.config import Experiment
from bgray.search import expand
from bgray.varying import Varying


@pytest.fixture
def expanded(tiny, tmp_path):
    """(sweep, {variant id: trial}) of a sweep file with these keys."""

    def expanded(**keys):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump({**tiny, "optim": {"name": "adamw", "lr": 1e-3}, **keys}))
        sweep, trials = expand(str(path))
        return sweep, {trial.variant: trial for trial in trials}

    return expanded


def test_it_is_what_the_trials_do_not_have_in_common(expanded):
    stft = {"weight": 1.0, "fft_sizes": [256], "hop_sizes": [64], "win_lengths": [256]}
    blocks = {
        "base": {},
        "wide": {"model.channels": [8, 16, 32], "optim.lr": 1e-3},  # the rate that all have
        "two losses": {"loss": {"l1": 0.5, "mrstft": {**stft, "n_bins": None}}},
    }
    varying = Varying(*expanded(variants=blocks))
    found = {trial.label: varying.values(trial) for trial in varying.variants()}
    assert found["base"] == {
        "variant": "base", "seed": 0, "model.channels": [4, 8, 16], "loss.l1": 1.0
    }  # fmt: skip
    assert found["wide"]["model.channels"] == [8, 16, 32]
    assert found["two losses"]["loss.mrstft.weight"] == 1.0
    assert "optim.lr" not in found["wide"]
    assert "loss.mrstft.weight" not in found["wide"]


def test_a_variant_that_comes_later_makes_more_of_it_vary(expanded):
    sweep, variants = expanded(variants={"base": {}, "fast": {"optim.lr": 1e-2}})
    (base, fast), now = variants.values(), {}
    now[base.variant] = base
    varying = Varying(sweep, now)
    assert varying.values(base) == {"variant": "base", "seed": 0}
    now[fast.variant] = fast
    assert varying.values(base)["optim.lr"] == 1e-3
    assert varying.values(fast)["optim.lr"] == 1e-2


def test_each_variant_is_resolved_once_however_many_trials_ask(expanded, monkeypatch):
    number = 12
    search = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
    sweep, variants = expanded(search=search, sampler="random", samples=number, seeds=2)
    asked, resolved = [], Experiment.resolved

    def counted(self):
        asked.append(self)
        return resolved(self)

    monkeypatch.setattr(Experiment, "resolved", counted)
    varying = Varying(sweep, variants)
    rates = set()
    for trial in variants.values():
        rates.add(varying.values(trial)["optim.lr"])
        again = dataclasses.replace(trial, label="again")
        assert varying.values(again)["variant"] == "again"
    assert len(rates) == number
    assert len(asked) == number
