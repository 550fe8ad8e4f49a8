"""The command line of the measurements."""

import pytest

from bgray.bench import main


def said(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_what_cannot_be_measured_is_told_with_its_place(tmp_path, capsys):
    assert "invalid choice: 'fed'" in said(["fed"], capsys)[-1]
    where, what = said(["step", str(tmp_path / "none.yaml")], capsys)
    assert where.endswith("none.yaml:")
    assert "no such file" in what
    where, what = said(["step", "--targets", "output99"], capsys)
    assert where == "error: bench step:"
    assert "--targets: unknown name, did you mean 'output19'?" in what


def test_a_measurement_of_nothing_is_refused_before_any_data_are_prepared(
    tiny, tmp_path, capsys, monkeypatch
):
    import yaml

    from bgray import experiment

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    monkeypatch.delattr(experiment, "prepare_data")
    assert (
        "--rounds: must be at least 1, got 0"
        in said(["step", str(path), "--rounds", "0"], capsys)[-1]
    )
    assert "--seconds: must be above 0" in said(["step", str(path), "--seconds", "0"], capsys)[-1]
    assert "--rounds: must be at least 1" in said(["feed", str(path), "--rounds", "-1"], capsys)[-1]
    wanted = ["feed", str(path), "--segments-per-second", "0"]
    assert "--segments-per-second: must be above 0" in said(wanted, capsys)[-1]
    assert "--soak: must be at least 100 steps, got 5" in said(["step", "--soak", "5"], capsys)[-1]
