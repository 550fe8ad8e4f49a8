import json

import pytest

from bgray.bench import main


@pytest.mark.ray
@pytest.mark.slow
def test_the_ratio_of_a_tune_trial_to_local_is_measured_in_one_run(tiny, tmp_path, capsys):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    main(["ray", str(path), "--rounds", "1", "--json", "--set", "train.steps=200"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["ratio"] == pytest.approx(seen["ray"][0] / seen["local"][0])
    assert 0.2 < seen["ratio"] < 5
    assert not (tmp_path / "results").exists()
