"""A Tune trial against --local, and trials that share a GPU against one alone."""

import json

import pytest

from bgray.bench import main


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.alone
def test_the_ratio_of_a_tune_trial_to_local_is_measured_in_one_run(tiny, tmp_path, capsys):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    main(["ray", str(path), "--rounds", "1", "--json", "--set", "train.steps=200"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["ratio"] == pytest.approx(seen["ray"][0] / seen["local"][0])
    assert 0.2 < seen["ratio"] < 5
    assert not (tmp_path / "results").exists()


def test_pack_says_that_it_needs_a_gpu(tiny, tmp_path, capsys, monkeypatch):
    import torch
    import yaml

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    with pytest.raises(SystemExit) as caught:
        main(["pack", str(path)])
    assert caught.value.code == 2
    assert "there is none here" in capsys.readouterr().err


def test_packs_ratio_is_of_all_trials_together_to_one_alone(tiny, tmp_path, capsys, monkeypatch):
    import torch
    import yaml

    from bgray import bench_ray

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {"vram_gib": 4.0, "overhead_gib": 0.5, "gpu": "L4", "gpu_gib": 24.0}
    monkeypatch.setattr(bench_ray, "_probe", lambda experiment: {**found, "out_of_memory": False})
    asked = []

    def together(experiment, number, limit_gib, seconds):
        asked.append((number, limit_gib))
        return [10.0] if number == 1 else [4.0] * number

    monkeypatch.setattr(bench_ray, "_together", together)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    main(["pack", str(path), "--rounds", "2"])
    assert asked == [(1, None), (4, pytest.approx(4.75))] * 2
    said = capsys.readouterr().out
    assert "4 at a time: 16.00 steps/s in all (4.00, 4.00, 4.00, 4.00)" in said
    assert "at a time / one after another: median 1.600" in said
    main(["pack", str(path), "--rounds", "1", "--most", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["ratio"] == pytest.approx(0.8)


@pytest.mark.slow
@pytest.mark.alone
def test_processes_measured_together_all_answer(tiny):
    """On the CPU: two processes wait for each other and are timed at the same time."""
    from bgray.bench_ray import _together
    from bgray.experiment import resolve

    found = _together(resolve(tiny, "f"), 2, None, 0.5, "cpu")
    assert len(found) == 2
    assert min(found) > 0
