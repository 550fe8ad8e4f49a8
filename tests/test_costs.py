"""What each kind of trial costs: which are measured, which are scaled."""

import pytest
import torch

from bgray import costs
from bgray.costs import Kind, Range, measure, num_items
from bgray.experiment import resolve
from bgray.rehearsal import Cost, cost_key

CPU = torch.device("cpu")


def cost(**facts):
    known = {
        "device": "cpu",
        "batch": 4,
        "step_seconds": (1.0,) * 5,
        "start_seconds": 10.0,
        "item_seconds": 2.0,
        "score_seconds": 0.5,
        "save_seconds": 1.0,
        "checkpoint_bytes": 1000,
        "clip_bytes": 100,
        "scores": 2,
        "parts": 4,
        "rss_gib": 1.0,
        "vram_gib": None,
        "overhead_gib": None,
        "gpu_gib": None,
    }
    return Cost(**{**known, **facts})


def kind(**facts):
    return Kind("one", Range(0.5, 1.0, 2.0), cost(**facts), "made up", True)


@pytest.fixture
def experiment(tiny):
    return resolve(tiny, "f")  # 24 steps, validation every 8 on 4 items, checkpoint every 4


def test_a_runs_time_is_the_sum_of_its_parts(experiment):
    # start 10, baseline 4 x 0.5, 3 evaluations of 4 x 2, 6 checkpoints
    aside = 10 + 2 + 24 + 6
    assert kind().seconds(experiment, 24) == Range(12 + aside, 24 + aside, 48 + aside)
    assert kind().seconds(experiment, 0) == Range(0, 0, 0)


def test_a_runs_storage_is_two_checkpoints_its_clips_and_text(experiment):
    # one clip at each of 3 evaluations, its input and target; 12 lines of 4 numbers, 4 items x 3
    text = 30 * 4 * 12 + 10 * 2 * 4 * 3
    assert kind().bytes(experiment, 24) == 2 * 1000 + 5 * 100 + text


def test_built_in_music_has_no_more_items_than_songs_give(tiny):
    tiny["data"] |= {"path": "builtin", "builtin_songs": 32, "builtin_seconds": 15}
    tiny["validation"]["items"] = 64
    assert num_items(resolve(tiny, "f")) == 8  # an eighth of the songs, two chunks of 10 s each
    tiny["validation"]["items"] = 5
    assert num_items(resolve(tiny, "f")) == 5


@pytest.fixture
def rehearsed(monkeypatch):
    """Rehearsals that take 0.1 s an example by a clock of their own; the batches are kept."""
    asked, now = [], [0.0]

    def rehearse(experiment, context, *, batch=None, steps=3, warm_up=3, seconds=1e9, **_):
        step = 0.1 * batch
        number = max(1, min(steps, int(seconds / step + 1e-9)))
        now[0] += step * (warm_up + number)
        asked.append((experiment.train.seed, batch, number))
        return cost(batch=batch, step_seconds=(step,) * number)

    monkeypatch.setattr(costs, "rehearse", rehearse)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    return asked


def test_a_full_batch_is_measured_where_time_allows(experiment, rehearsed):
    found = measure([("a", experiment)], threads=1, device=CPU, seconds=10.0)
    assert [batch for _, batch, _ in rehearsed] == [1, 4]
    only = found[cost_key(experiment)]
    assert only.step_seconds.middle == pytest.approx(0.4)
    assert only.whole


def test_a_part_of_a_batch_stands_for_all_of_it_and_is_less_sure(experiment, rehearsed):
    found = measure([("a", experiment)], threads=1, device=CPU, seconds=0.95)
    assert rehearsed[-1][1] == 3
    only = found[cost_key(experiment)]
    assert only.step_seconds.middle == pytest.approx(0.4)
    assert only.step_seconds.high > 1.2 * only.step_seconds.middle
    assert only.step_seconds.low < only.step_seconds.middle / 1.5
    assert "3 examples instead of 4" in only.sure
    assert not only.whole


def test_where_time_is_up_one_example_must_do(experiment, rehearsed):
    found = measure([("a", experiment)], threads=1, device=CPU, seconds=0.1)
    assert len(rehearsed) == 1
    only = found[cost_key(experiment)]
    assert only.step_seconds.middle == pytest.approx(0.4)
    assert only.step_seconds.low < 0.4 / 3
    assert only.sure == "1 step of 1 example instead of 4"


def variants(tiny, widths):
    for width in widths:
        tiny["model"]["channels"] = [width, 2 * width, 4 * width]
        yield f"width {width}", resolve(tiny, "f")


def test_those_beyond_the_time_are_scaled_by_parameters_and_say_so(tiny, rehearsed):
    pairs = list(variants(tiny, [4, 8, 16]))
    found = measure(pairs, threads=1, device=CPU, seconds=20.0, most=2)
    small, middle, large = (found[cost_key(experiment)] for _, experiment in pairs)
    assert middle.sure.endswith("4 examples")
    assert large.sure == "scaled from width 8"
    ratio = large.step_seconds.middle / middle.step_seconds.middle
    assert 3 < ratio < 4.5  # four times the weights of its convolutions, fewer elsewhere
    assert large.step_seconds.high == pytest.approx(2 * ratio * middle.step_seconds.high)
    assert large.cost.checkpoint_bytes > 3 * middle.cost.checkpoint_bytes
    assert not large.whole


def test_seeds_of_one_variant_are_measured_once(tiny, rehearsed):
    pairs = []
    for seed in range(3):
        tiny["train"]["seed"] = seed
        pairs.append(("a", resolve(tiny, "f")))
    assert len(measure(pairs, threads=1, device=CPU, seconds=20.0)) == 1
    assert {seed for seed, _, _ in rehearsed} == {0}
