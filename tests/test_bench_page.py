"""The page's time and memory are measured, stage by stage."""

import json

import pytest

from bgray import bench, bench_page
from bgray.config import ConfigError


def test_each_stage_has_its_time_and_memory(capsys):
    args = ["page", "--trials", "4", "--steps", "200", "--log-every", "2", "--json"]
    bench.main(args)
    found = json.loads(capsys.readouterr().out)
    assert (found["trials"], found["steps"], found["log_every"]) == (4, 200, 2)
    peaks = [stage["peak_mib"] for stage in found["stages"].values()]
    assert peaks == sorted(peaks)
    assert peaks[0] >= found["start_mib"] > 1
    assert all(stage["seconds"] > 0 for stage in found["stages"].values())
    assert found["figure_bytes"].keys() < found["stages"].keys()
    assert found["figure_bytes"]["curves of the loss"] > found["figure_bytes"]["curves of a score"]
    assert found["file_bytes"] > 4 * 100 * 50
    text = bench_page.as_text(found).splitlines()
    assert text[0].startswith("4 trials x 200 steps, a line every 2: ")
    assert len(text) == 2 + len(found["stages"])


def test_too_small_a_sweep_is_refused_in_words():
    with pytest.raises(ConfigError, match="--trials: must be at least 4, got 1"):
        bench_page.measured(1, 100, 1)
    with pytest.raises(ConfigError, match="--log-every: must be at least 1, got 0"):
        bench_page.measured(4, 100, 0)
