import io
from pathlib import Path

import pytest
from rich.console import Console

from bgray.experiment import run_url
from bgray.search import expand
from bgray.summary import forecast, shorter

KERNELS = str(Path(__file__).parent.parent / "sweeps" / "kernels.yaml")


def said(sweep, trials, **options):
    out = io.StringIO()
    forecast(sweep, trials, 1, 2, Console(file=out, width=500), **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def kernels():
    return expand(KERNELS)


def test_a_full_size_sweep_on_a_cpu_says_how_long_and_how_to_make_it_short(kernels):
    text = said(*kernels)
    assert "No GPU here: about" in text
    assert "days for these 5 trials" in text
    assert "--set train.steps=100" in text
    assert "--set asha=null" in text


def test_what_it_suggests_is_valid_and_far_shorter(kernels):
    changes = shorter(kernels[0], kernels[1][0].experiment)
    sets = tuple(f"{key}={'null' if value is None else value}" for key, value in changes.items())
    _, trials = expand(KERNELS, sets)
    assert len(trials) == 5
    train, data = trials[0].experiment.train, trials[0].experiment.data
    assert train.steps * train.batch_size * data.segment * 500 < 10_000 * 32 * 32768


def test_a_sweep_within_a_persons_patience_says_nothing(kernels):
    assert said(*kernels, patience_seconds=float("inf")) == ""


def test_trials_write_below_the_sweeps_name(kernels):
    assert all(f"/kernels/{t.id}" in run_url(t.experiment) for t in kernels[1])
