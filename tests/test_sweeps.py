"""Every YAML in sweeps/ states its question and resolves: nothing in it is misspelt or misfits."""

from pathlib import Path

import pytest

from bgray.document import read
from bgray.oracle import parse
from bgray.search import expand
from bgray.sweep import main

SWEEPS = sorted(Path("sweeps").glob("*.yaml"))
QUESTIONS = {
    "000": [
        "separation_models",
        "separation_losses",
        "separation_heads",
        "chunk_length",
        "chunk_discard",
    ],
    "001": [
        "deartifact",
        "deartifact_models",
        "deartifact_lr",
        "deartifact_depth",
        "deartifact_passes",
        "deartifact_losses",
        "dac_features",
        "psgd",
    ],
    "002": [
        "unshift",
        "unshift_models",
        "levels",
        "patching",
        "norm",
        "activation",
        "kernels",
        "width",
        "band_limit",
        "lr",
        "momentum",
        "beta",
    ],
    "003": ["rolls", "rolls_losses"],
    "004": ["open_unmix", "umx_window", "oracle"],
    "none": ["quickstart", "verdicts", "precision"],
}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_states_its_question_and_cost_and_every_trial_resolves(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Question: ")
    assert any(line.startswith("# Cost: ") for line in lines[:4])
    raw = read(str(path))
    if "oracle" in raw:
        assert parse(raw, str(path)).oracle.seeds == (42, 1337)
        return
    _, trials = expand(str(path))
    assert len({trial.id for trial in trials}) == len(trials)
    combined = [trial.label for trial in trials if " = " in trial.label]
    assert combined == []  # two variants that are one experiment


def test_every_question_of_the_logs_has_its_sweep():
    named = [name for names in QUESTIONS.values() for name in names]
    assert sorted(path.stem for path in SWEEPS) == sorted(named)


def test_the_oracle_is_asked_by_the_same_command(tmp_path, capsys):
    results = f"oracle.results={tmp_path}"
    with pytest.raises(SystemExit) as ended:
        main(["sweeps/oracle.yaml", "--dry", "--set", results, "--set", "oracle.builtin_seconds=2"])
    assert ended.value.code == 0
    assert "windows, 3 overlaps: " in capsys.readouterr().out
