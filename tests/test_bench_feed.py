"""What a segment costs: the candidates make the same arrays, and the figures follow from turns."""

import json

import numpy as np
import pytest
from test_bench_step import turns

from bgray import bench_feed, bench_makers
from bgray.bench_turns import spread
from bgray.data import make_unit
from bgray.experiment import build_recipe, prepare_data, resolve


@pytest.fixture
def recipe(tiny):
    experiment = resolve(tiny, "f")
    return build_recipe(experiment, prepare_data(experiment))


def test_the_dataloader_yields_exactly_bgrays_units_in_their_order(recipe):
    loaded = list(bench_makers.loader(recipe, workers=2, stop=5))
    assert len(loaded) == 5
    for unit, arrays in enumerate(loaded):
        for mine, theirs in zip(make_unit(recipe, unit), arrays, strict=True):
            assert theirs.numpy().dtype == np.int16
            np.testing.assert_array_equal(mine, theirs.numpy())


def test_each_candidate_takes_as_many_units_as_it_is_told(recipe, monkeypatch):
    taken = []
    monkeypatch.setattr(
        bench_makers.Consumer, "__call__", lambda self, x, y: taken.append(np.array(x))
    )
    expected = [x for unit in range(3) for x in make_unit(recipe, unit)[0]]
    for work in (bench_makers.computing, bench_makers.in_process):
        taken.clear()
        ready, found = turns(work, [(0, 1), (1, 2)], recipe)
        assert ready is None
        assert [turn["units"] for turn in found] == [1, 2]
        np.testing.assert_array_equal(taken, expected)


def test_what_is_read_from_the_cache_is_the_same_and_counts_as_hits(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_makers, "KEPT_UNITS", 3)
    taken = []
    monkeypatch.setattr(
        bench_makers.Consumer, "__call__", lambda self, x, y: taken.append(np.array(x))
    )
    _, (found,) = turns(bench_makers.cached, [(0, 6)], recipe, str(tmp_path))
    assert found["units"] == 6
    assert 0 <= found["hits"] <= 3
    expected = [x for unit in range(3) for x in make_unit(recipe, unit)[0]]
    np.testing.assert_array_equal(taken, expected * 3)  # made once, then read twice


def test_a_segment_on_the_wire_is_int16_for_the_input_and_each_source(recipe):
    assert bench_feed.wire_bytes(recipe) == 2 * 512 * (1 + 1)


def test_the_disks_share_is_what_a_unit_reads_over_its_segments(recipe):
    found = bench_feed.disk(recipe)
    assert found["bytes_per_second"] > 1e5
    # A unit reads two row groups of a few seconds at 8 kHz, FLAC, both voices.
    assert 100 < found["bytes_per_segment"] * recipe.batch_size * recipe.batches_per_unit < 2e6


def row(ms, consumer_ms=0.01, start=1.0):
    return {
        "ms": spread([ms] * 2),
        "consumer_ms": consumer_ms,
        "start_cpu_seconds": start,
        "efficiency": 1.0 / ms,
        "over_ms": ms - 1.0,
        "segments_per_second_per_core": 1000 / ms,
        "clear": ms > 1.0,
        "session": 8.0,
        "cold_cpu_seconds": 4.0,
    }


def found_of(rows):
    return {
        "name": "made up",
        "units": 3,
        "segments_per_unit": 16,
        "segment": 512,
        "sample_rate": 8000,
        "wire_bytes": 2048,
        "disk": {"bytes_per_segment": 1e4, "bytes_per_second": 1e7},
        "cache_hits": 3,
        "rows": rows,
    }


def test_cores_and_the_expected_wait_follow_from_milliseconds(monkeypatch):
    monkeypatch.setattr(bench_feed.os, "cpu_count", lambda: 5)
    rows = {"bgray, in process": row(2.0), "bgray, Ray Data": row(2.0, consumer_ms=0.1)}
    told = bench_feed.predicted(found_of(rows), 1500.0)
    one, many = told["bgray, in process"], told["bgray, Ray Data"]
    assert one["cores_per_gpu"] == pytest.approx(3.0)
    assert one["bound"] == "CPU"
    assert one["data_wait_expected"] == pytest.approx(1 - 500 / 1500)
    assert many["segments_per_second"]["CPU"] == pytest.approx(2000)  # four cores make
    assert many["segments_per_second"]["wire"] == pytest.approx(10_000)
    assert many["bound"] == "disk"  # 1000 segments a second
    assert many["data_wait_expected"] == pytest.approx(1 / 3)
    assert bench_feed.predicted(found_of(rows), 400.0)["bgray, Ray Data"]["data_wait_expected"] == 0


def test_the_table_has_the_same_figures_as_the_json():
    rows = {
        "pure computing": row(1.0),
        "copying alone": row(0.03),
        "bgray, in process": row(1.125),
        "bgray, feed cache": row(0.05),
        "bgray, Ray Data": row(1.25),
    }
    one = found_of(rows)
    one["prediction"] = bench_feed.predicted(one, 3200.0)
    found = {
        "cores": 2,
        "rounds": 2,
        "wanted": 3200.0,
        "wanted_is_given": True,
        "streams": {"own": one},
    }
    found = json.loads(json.dumps(found))
    lines = bench_feed.as_text(found).splitlines()
    for name in rows:
        line = next(line for line in lines if line.startswith(name))
        assert f"{found['streams']['own']['rows'][name]['ms']['median']:.4f}" in line
    text = "\n".join(lines)
    assert "without the copying: 0.0200 ms a segment, 48 times cheaper than making" in text
    assert "(rounds overlap)" in next(line for line in lines if line.startswith("copying alone"))
    assert "3.60 cores per GPU" in text


@pytest.mark.slow
@pytest.mark.alone
def test_a_turn_of_twice_the_units_costs_twice_the_time_and_the_candidates_agree(tiny):
    experiment = resolve(tiny, "f")
    found = bench_feed.measured(experiment, rounds=1, units=60, ray=False, wanted=100.0)
    rows = found["streams"]["tiny"]["rows"]
    assert rows["pure computing"]["ms"]["median"] > 0.05
    for name in ("torch DataLoader", "bgray, in process"):
        assert 0.5 < rows[name]["efficiency"] < 1.5
    assert f"{rows['torch DataLoader']['ms']['median']:.4f}" in bench_feed.as_text(found)
