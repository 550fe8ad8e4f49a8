import json
from pathlib import Path
from urllib.request import urlopen

import pytest

from bgray.session import dashboard_told, left_beside, ray_session


def test_a_link_that_cannot_be_written_is_said_and_ends_nothing(tmp_path):
    Path(tmp_path, ".ray").write_text("in the way")
    said, went_on = [], False
    with left_beside(str(tmp_path), "http://127.0.0.1:8265", said.append):
        went_on = True
    assert went_on
    assert len(said) == 1
    assert f"{tmp_path}/.ray/session.json cannot be written" in said[0]
    assert Path(tmp_path, ".ray").read_text() == "in the way"


@pytest.mark.slow
@pytest.mark.ray
def test_rays_dashboard_is_said_and_left_beside_the_runs_while_it_runs(tmp_path, monkeypatch):
    said, place = [], Path(tmp_path, ".ray", "session.json")
    with ray_session(dashboard=True):
        with dashboard_told(str(tmp_path), said.append):
            left = json.loads(place.read_text())
            assert urlopen(left["ray_dashboard"]).status == 200
            assert left["ray_dashboard"].startswith("http://127.0.0.1:")
        assert said == [f"Ray's own dashboard: {left['ray_dashboard']}"]
        assert not place.exists()
        # As Ray sets it where nobody has; and on a cluster's head.
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        with dashboard_told(str(tmp_path), said.append):
            place.write_text("{}")  # another driver has taken the sweep over
        assert place.exists()
    assert "`uv run ray get-auth-token`" in said[1]
    assert "`uv run ray dashboard cluster/gpu.yaml`" in said[1]


@pytest.mark.slow
@pytest.mark.ray
def test_where_ray_runs_without_a_dashboard_nothing_is_said_but_what_cannot_be_written(tmp_path):
    with ray_session(), dashboard_told(str(tmp_path), pytest.fail):
        left = json.loads(Path(tmp_path, ".ray", "session.json").read_text())
        assert left["ray_dashboard"] is None
        Path(tmp_path, "a-file").write_text("")
        said = []
        with dashboard_told(f"{tmp_path}/a-file", said.append):
            assert len(said) == 1
            assert "session.json cannot be written" in said[0]
