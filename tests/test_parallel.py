"""Parallel coordinates take any settings, and show what failed."""

import math

import pytest

from bgray.parallel import AXES, parallel
from bgray.reading import Reader
from bgray.specimen import Made, make


def sweep(tmp_path, *variants, seeds=1):
    url = str(tmp_path / "sweep")
    make(url, variants, seeds=seeds, steps=100, log_every=50, items=3, evaluations=2, clips=0)
    return Reader(url).read()


def axes(made):
    (trace,) = made.data
    return {axis.label: axis for axis in trace.dimensions}


def shown(axis):
    """What the axis says at each value."""
    ticks = dict(zip(axis.tickvals, axis.ticktext, strict=True))
    return [ticks.get(value) for value in axis["values"]]


def test_an_axis_for_each_setting_that_varies_and_one_for_the_difference(tmp_path):
    results = sweep(
        tmp_path,
        Made("a"),
        Made("b", {"optim.lr": 0.01, "model.kernels": [7, 23]}, gain=0.1),
        Made("c", {"optim.name": "adamw"}, gain=-0.1),
    )
    found = axes(parallel(results, "val_stft"))
    assert set(found) == {"kernels", "optim.name", "lr", "Δ val_stft ↓"}
    order = [entry.label for entry in results.entries]
    assert order == ["a", "b", "c"]
    assert list(found["lr"]["values"]) == [0.005, 0.01, 0.005]
    assert shown(found["lr"]) == ["0.005", "0.01", "0.005"]
    assert shown(found["kernels"]) == ["[41]", "[7, 23]", "[41]"]
    assert shown(found["optim.name"]) == ["muon", "muon", "adamw"]
    difference = found["Δ val_stft ↓"]
    means = [0.0] + [e.rows["val_stft"].parts.mean for e in results.entries[1:]]
    assert list(difference["values"]) == means
    assert shown(difference) == ["+0.0000", f"{means[1]:+.4f}", f"{means[2]:+.4f}"]
    assert axes(parallel(results, "val_si_sdr"))["Δ val_si_sdr ↑"]


def test_better_is_blue_whichever_way_a_score_goes(tmp_path):
    results = sweep(
        tmp_path,
        Made("a"),
        Made("b", {"optim.lr": 0.01}, gain=0.1),
        Made("c", {"optim.lr": 0.02}, gain=-0.1),
    )

    def colours(metric):
        line = parallel(results, metric).data[0].line
        scale = [(line.cmin + at * (line.cmax - line.cmin), c) for at, c in line.colorscale]
        return [min(scale, key=lambda one: abs(one[0] - v))[1] for v in line.color]

    for metric in ("val_stft", "val_si_sdr"):
        assert colours(metric) == ["#8a8a8a", "#0072b2", "#d55e00"]


def test_a_variant_that_failed_is_black_ends_at_none_and_has_its_state(tmp_path):
    results = sweep(
        tmp_path,
        Made("a"),
        Made("b", {"optim.lr": 0.01}),
        Made("c", {"optim.lr": 0.02}, state="out_of_memory", until=10),
    )
    made = parallel(results, "val_stft")
    place = [entry.label for entry in results.entries].index("c")
    found = axes(made)
    assert shown(found["state"])[place] == "out of memory"
    assert shown(found["Δ val_stft ↓"])[place] == "none"
    line = made.data[0].line
    assert line.color[place] == line.cmin
    assert line.colorscale[0] == (0.0, "#000000")
    low, high = found["Δ val_stft ↓"].range
    assert all(low <= v <= high for axis in found.values() for v in axis["values"] if axis.label
               == "Δ val_stft ↓")  # fmt: skip


def test_where_all_have_finished_there_is_no_state(tmp_path):
    results = sweep(tmp_path, Made("a"), Made("b", {"optim.lr": 0.01}))
    assert set(axes(parallel(results, "val_stft"))) == {"lr", "Δ val_stft ↓"}


def test_numbers_over_many_powers_of_ten_are_on_a_logarithmic_axis(tmp_path):
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    results = sweep(tmp_path, *(Made(f"{r}", {"optim.lr": r}) for r in rates))
    axis = axes(parallel(results, "val_stft"))["lr"]
    assert sorted(axis["values"]) == pytest.approx([-4, -3, -2, -1])
    assert sorted(zip(axis["values"], shown(axis), strict=True))[0][1] == "0.0001"


@pytest.mark.parametrize("odd", [None, math.nan, math.inf])
def test_what_is_no_number_has_a_place_below_the_numbers(tmp_path, odd):
    results = sweep(
        tmp_path,
        Made("a", {"optim.x": 1.0}),
        Made("b", {"optim.x": 2.0}),
        Made("c", {"optim.x": odd}),
    )
    axis = axes(parallel(results, "val_stft"))["x"]
    place = [entry.label for entry in results.entries].index("c")
    values = list(axis["values"])
    assert values[place] == axis.range[0] < 1.0
    assert shown(axis)[place] == {None: "-"}.get(odd, str(odd))
    assert all(math.isfinite(v) for v in values)


def test_true_and_false_and_mixed_kinds_are_categories(tmp_path):
    kinds = [True, False, 1, "1", [1]]
    results = sweep(tmp_path, *(Made(f"v{i}", {"optim.x": k}) for i, k in enumerate(kinds)))
    axis = axes(parallel(results, "val_stft"))["x"]
    assert sorted(shown(axis)) == ["1", "1", "False", "True", "[1]"]


def test_settings_of_the_same_name_have_more_of_their_path(tmp_path):
    other = {"model.rate": 2, "optim.rate": 3, "loss.l1.weight": 4}
    results = sweep(tmp_path, Made("a", {"model.rate": 1, "optim.rate": 1}), Made("b", other))
    assert set(axes(parallel(results, "val_stft"))) == {
        "model.rate",
        "optim.rate",
        "loss.l1",
        "Δ val_stft ↓",
    }


@pytest.mark.parametrize("number", [1, 2])
def test_where_nothing_varies_it_says_so(tmp_path, number):
    results = sweep(tmp_path, *(Made(f"v{i}") for i in range(number)))
    made = parallel(results, "val_stft")
    assert made.data == ()
    assert "nothing" in made.layout.annotations[0].text


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (("finished",), "There is only one variant"),
        (("finished", "waiting", "waiting"), "Only one variant has begun"),
        (("waiting", "waiting"), "No variant has begun"),
    ],
)
def test_before_two_have_begun_it_says_how_many_have(tmp_path, states, said):
    variants = [Made(f"v{i}", {"optim.lr": i}, state=state) for i, state in enumerate(states)]
    made = parallel(sweep(tmp_path, *variants), "val_stft")
    assert made.data == ()
    assert said in made.layout.annotations[0].text


def test_two_hundred_variants_with_long_names_have_ticks_that_can_be_read(tmp_path):
    variants = [
        Made(f"v{i}", {"optim.lr": 0.001 + i * 1e-5, "model.text": f"{i} " + "long " * 20})
        for i in range(200)
    ]
    results = sweep(tmp_path, *variants)
    for axis in axes(parallel(results, "val_stft")).values():
        assert len(axis["values"]) == 200
        assert 2 <= len(axis.ticktext) <= 16
        assert max(map(len, axis.ticktext)) <= 40
        low, high = axis.range
        assert all(low <= v <= high for v in axis["values"])
        gaps = [b - a for a, b in zip(axis.tickvals, axis.tickvals[1:], strict=False)]
        assert min(gaps) >= 0.03 * (high - low)


def test_more_settings_than_there_is_room_for_are_counted(tmp_path):
    keys = {f"optim.k{i:02d}": 1 for i in range(AXES + 3)}
    results = sweep(
        tmp_path,
        Made("a", keys),
        Made("b", {k: 2 for k in keys}),
        Made("c", {**keys, "optim.k12": 3}),
    )
    made = parallel(results, "val_stft")
    assert len(axes(made)) == AXES + 1
    assert "3 more settings vary" in made.layout.annotations[0].text
    assert "k12" in axes(made)  # of which there are the most values


def test_the_chosen_keep_their_colour(tmp_path):
    results = sweep(tmp_path, Made("a"), *(Made(f"v{i}", {"optim.lr": i}) for i in range(1, 5)))
    chosen = results.entries[2]
    line = parallel(results, "val_stft", [chosen.id]).data[0].line
    assert [value < line.cmax for value in line.color] == [
        entry is chosen for entry in results.entries
    ]
