"""Quality against cost: only like is compared with like, and what is not is seen to be not."""

import json

import numpy as np
import pytest

from bgray import storage
from bgray.quality import KINDS, NAME, _front, _Point, _range, quality_cost
from bgray.reading import Reader
from bgray.specimen import Made, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("quality") / "sweep")
    variants = [
        Made("baseline"),
        Made("dear and better", {"optim.lr": 0.1}, gain=0.1, vram_gib=12.0, minutes_to_10k=80),
        Made("dear and worse", {"optim.lr": 0.2}, gain=-0.1, vram_gib=13.0, minutes_to_10k=90),
        # As cheap as can be and, as far as it got, the best: it must not win by having stopped.
        Made("cut short", {"optim.lr": 0.3}, gain=0.5, vram_gib=5.0, minutes_to_10k=20),
        Made("lost", {"optim.lr": 0.4}, state="failed", until=5, reason="no", vram_gib=8.0),
        Made("no <b>GPU</b>", {"optim.lr": 0.5}, vram_gib=None),
    ]
    make(url, variants, seeds=2, steps=200, items=6, clips=0)
    results = Reader(url).read()
    for trial in entry(results, "cut short").trials:
        for name in ("metrics.jsonl", "validation_items.jsonl"):
            path = f"{trial.url}/{name}"
            lines = storage.read_bytes(path).splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= 100]
            storage.write_bytes(path, b"".join(kept))
        patch(trial, state="stopped", step=100)
    (one, other) = entry(results, "lost").trials
    for name in ("run.json", "validation_items.jsonl", "experiment.yaml"):
        storage.remove(f"{other.url}/{name}")
    return url


def patch(trial, **facts):
    info = json.loads(storage.read_bytes(f"{trial.url}/run.json"))
    storage.write_bytes(f"{trial.url}/run.json", json.dumps({**info, **facts}).encode())


@pytest.fixture(scope="module")
def results(folder):
    return Reader(folder).read()


def entry(results, label):
    return next(e for e in results.entries if e.label == label)


def points(made):
    """(x, y, opacity, symbol, words) by the first words."""
    found = {}
    for trace in made.data:
        if trace.mode == "markers" and trace.text is not None:
            marker = trace.marker
            for place, text in enumerate(trace.text):
                name = text.split("<br>")[0]
                assert name not in found
                found[name] = (
                    trace.x[place],
                    trace.y[place],
                    marker.opacity[place],
                    marker.symbol[place],
                    text,
                )
    return found


def front(made):
    return next((list(zip(t.x, t.y, strict=True)) for t in made.data if t.uid == "front"), [])


def test_a_point_is_the_difference_that_the_comparison_says(results):
    found = points(quality_cost(results, "val_stft"))
    for label in ("dear and better", "dear and worse", "cut short"):
        row = entry(results, label).rows["val_stft"]
        assert found[label][:2] == (entry(results, label).vram_gib, row.parts.mean)
    assert found["baseline"][:2] == (6.7, 0.0)


def test_intervals_are_drawn_as_they_are_said(results):
    made = quality_cost(results, "val_stft")
    bars = {trace.uid: list(trace.y) for trace in made.data if trace.uid.startswith("bar ")}
    better = entry(results, "dear and better")
    assert bars[f"bar {better.id}"] == list(better.rows["val_stft"].verdict.interval)
    assert f"bar {entry(results, 'baseline').id}" not in bars


def test_the_interval_of_the_only_variant_is_on_the_axis(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a"), Made("b", {"optim.lr": 0.1})], seeds=3, steps=50, items=4, clips=0)
    results = Reader(url).read()
    made = quality_cost(results, "val_stft")
    bottom, top = results.entries[1].rows["val_stft"].verdict.interval
    low, high = made.layout.yaxis.range
    assert low < bottom < top < high
    assert "longer than" not in made.layout.xaxis.title.text


def test_an_interval_that_goes_beyond_the_axis_is_noted():
    def point(y, half):
        return _Point(None, 1.0, y, (y - half, y + half), "measured", 1, False, "")

    usual = [point(0.1 * i, 0.05) for i in range(4)]
    assert _range(usual)[2] == []
    low, high, notes = _range([*usual, point(0.15, 50.0)])
    assert high - low < 2.0
    assert notes == ["1 interval longer than what is shown"]


def test_what_was_compared_early_is_pale_says_so_and_wins_nothing(results):
    made = quality_cost(results, "val_stft")
    found = points(made)
    assert found["cut short"][1] < found["dear and better"][1]  # it looks the best
    assert found["cut short"][2] < 0.5 < found["dear and better"][2]
    assert "compared at step 100 only, others at 200" in found["cut short"][4]
    better = found["dear and better"]
    assert front(made) == [(6.7, 0.0), better[:2]]
    assert "an earlier step" in "".join(trace.name or "" for trace in made.data)


def test_what_cannot_be_compared_is_there_at_the_edge(results):
    made = quality_cost(results, "val_stft")
    x, y, _, symbol, text = points(made)["lost"]
    low, high = made.layout.yaxis.range
    assert (x, symbol) == (8.0, "x")
    assert low < y < low + (high - low) / 10
    assert "no comparison" in text


def test_what_has_no_cost_is_named_below(results):
    title = quality_cost(results, "val_stft").layout.xaxis.title.text
    assert "no cost known of no &lt;b&gt;GPU&lt;/b&gt; (2 finished)" in title
    assert "no &lt;b&gt;GPU&lt;/b&gt;" in points(quality_cost(results, "val_stft", "minutes"))


def test_the_axis_says_which_way_is_better(results):
    assert "↓ is better" in quality_cost(results, "val_stft").layout.yaxis.title.text
    assert "↑ is better" in quality_cost(results, "val_si_sdr").layout.yaxis.title.text
    assert quality_cost(results, "val_stft").layout.xaxis.title.text.startswith("GPU memory (GiB)")


def test_times_that_are_extrapolated_or_of_a_shared_gpu_look_so(folder):
    results = Reader(folder).read()
    for trial in entry(results, "dear and better").trials:
        trial.info["timing"] = {**trial.info["timing"], "packed": True}
    for trial in entry(results, "dear and worse").trials:
        trial.info["timing"] = {**trial.info["timing"], "time_to_10k_steps_extrapolated": False}
    made = quality_cost(results, "val_stft", "minutes")
    found = points(made)
    assert found["dear and worse"][3] == KINDS["measured"]
    assert found["baseline"][3] == "star-open"
    assert found["dear and better"][3] == KINDS["GPU shared"]
    assert found["dear and better"][0] == pytest.approx(80)
    assert found["dear and better"][:2] not in front(made)
    assert "(~80 min)" in found["dear and better"][4]


def test_names_do_not_lie_on_each_other(results):
    made = quality_cost(results, "val_stft")
    names = [note.text for note in made.layout.annotations]
    assert "baseline" in names
    assert len(names) == len({*names}) >= 3


def test_the_chosen_and_the_baseline_are_named_among_hundreds(tmp_path):
    url = str(tmp_path / "sweep")
    rng = np.random.default_rng(0)
    variants = [Made("baseline")]
    for i in range(150):
        gain, vram = rng.normal(0, 0.03), 5 + 5 * rng.random()
        variants.append(Made(f"draw {i}", {"optim.lr": 0.1 + i}, gain=gain, vram_gib=vram))
    make(url, variants, seeds=1, steps=100, log_every=50, items=3, evaluations=2, clips=0)
    results = Reader(url).read()
    chosen = results.entries[70]
    made = quality_cost(results, "val_stft", chosen=[chosen.id])
    names = [note.text for note in made.layout.annotations]
    assert names[:2] == ["baseline", chosen.label]
    assert max(map(len, names)) <= NAME
    assert len(names) <= 9
    found = points(made)
    assert len(found) == 151
    pale = [label for label, point in found.items() if point[2] < 0.5]
    assert len(pale) == 149
    assert not {chosen.label, "baseline"} & {*pale}


def test_without_a_gpu_and_without_a_comparison_it_says_why(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a", vram_gib=None), Made("b", vram_gib=None)], seeds=1, steps=50, clips=0)
    results = Reader(url).read()
    said = quality_cost(results, "val_stft").layout.annotations[0].text
    assert "no trial has run on a GPU" in said
    said = quality_cost(results, "no such").layout.annotations[0].text
    assert "No variant has been compared by no such yet" in said


@pytest.mark.parametrize("least", [True, False])
def test_the_front_is_all_that_nothing_beats_in_both(least):
    rng = np.random.default_rng(3)
    found = [
        _Point(None, float(x), float(y), None, "measured", 1, False, "")
        for x, y in rng.integers(0, 12, (60, 2))
    ]
    sign = 1 if least else -1

    def beaten(point):
        return any(
            o.x <= point.x and sign * o.y <= sign * point.y and (o.x, o.y) != (point.x, point.y)
            for o in found
        )

    expected = sorted({(p.x, p.y) for p in found if not beaten(p)})
    assert [(p.x, p.y) for p in _front(found, least)] == expected
