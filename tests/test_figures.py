"""Learning curves show every trial and how it ended, and no more points than a page can take."""

import json

import numpy as np
import pytest

from bgray import figures, storage
from bgray.reading import Reader
from bgray.specimen import Made, make

LONG = "a very <b>long</b> name & %{x} " * 4


def rewrite(trial, spoil):
    """A trial's metrics.jsonl with each line as `spoil` makes it."""
    path = f"{trial.url}/metrics.jsonl"
    lines = [spoil(json.loads(line)) for line in storage.read_bytes(path).splitlines()]
    storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("figures") / "sweep")
    variants = [
        Made("baseline"),
        Made(LONG, {"optim.lr": 0.1}, gain=0.1),
        Made("pruned", {"optim.lr": 0.2}, state="stopped", until=60, reason="pruned by ASHA"),
        Made("broken", {"optim.lr": 0.3}, state="diverged", until=100, reason="loss was NaN"),
        Made("early", {"optim.lr": 0.4}, state="failed", until=5, reason="ValueError: <i>no</i>"),
        Made("late", {"optim.lr": 0.5}, state="waiting"),
    ]
    make(url, variants, seeds=2, steps=200, log_every=5, items=3, clips=0)
    manifest = json.loads(storage.read_bytes(f"{url}/sweep.json"))
    storage.write_bytes(f"{url}/sweep.json", json.dumps({**manifest, "rungs": [60]}).encode())
    broken = entry(Reader(url).read(), "broken").trials[0]

    def spoil(line):
        step = line["step"]
        if "val" in line:
            return {**line, "val": {**line["val"], "val_stft": 1e9 if step == 60 else 0.5}}
        return {**line, "loss": float("nan") if step > 80 else 1e30 if step > 60 else line["loss"]}

    rewrite(broken, spoil)
    return url


@pytest.fixture(scope="module")
def results(folder):
    return Reader(folder).read()


def entry(results, label):
    return next(e for e in results.entries if e.label == label)


def lines(made):
    """The curves, by uid: those of trials have their run id."""
    return {t.uid: t for t in made.data if t.mode == "lines" and t.uid != "unprocessed"}


def marks(made, state):
    return next((t for t in made.data if t.uid == f"state {state}"), None)


def trials(results):
    return {t.id for t in results.trials.values() if t.state != "waiting"}


def test_every_trial_has_a_line_with_its_values(results):
    made = figures.learning_curves(results, "val_stft")
    early = entry(results, "early").trials[0].id
    runs = [uid for uid in lines(made) if not uid.endswith("mean")]
    assert set(runs) == trials(results) - {early}  # which has not been evaluated
    trial = entry(results, "baseline").trials[1]
    steps, values = results.curve(trial, "val_stft")
    line = lines(made)[trial.id]
    np.testing.assert_array_equal(line.x, steps)
    np.testing.assert_allclose(line.y, values, rtol=1e-6)


def test_seeds_are_thin_and_their_mean_is_thick(results):
    made = figures.learning_curves(results, "val_stft")
    variant = entry(results, "baseline")
    mean = lines(made)[f"{variant.id} mean"]
    seeds = [lines(made)[trial.id] for trial in variant.trials]
    np.testing.assert_allclose(mean.y, np.mean([seed.y for seed in seeds], axis=0), rtol=1e-6)
    assert all(seed.line.width < mean.line.width for seed in seeds)
    assert "mean of seeds 0, 1" in mean.meta[0]


def test_a_mean_has_only_the_steps_that_all_its_seeds_have(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a")], seeds=3, steps=100, items=2, clips=0)
    first, second, third = Reader(url).read().entries[0].trials
    gone = {first.id: 20, second.id: 50, third.id: 100}
    for trial in (first, second, third):
        at = gone[trial.id]
        rewrite(trial, lambda line, at=at: {**line, "val": {}} if line["step"] == at else line)
    results = Reader(url).read()
    (variant,) = results.entries
    mean = lines(figures.learning_curves(results, "val_stft"))[f"{variant.id} mean"]
    assert mean.x.tolist() == [10, 30, 40, 60, 70, 80, 90]
    curves = [dict(zip(*results.curve(t, "val_stft"), strict=True)) for t in variant.trials]
    expected = [np.mean([curve[step] for curve in curves]) for step in mean.x]
    np.testing.assert_allclose(mean.y, expected, rtol=1e-6)


def test_a_mean_ends_where_one_of_its_seeds_does_and_leaves_out_those_that_broke(results):
    found = lines(figures.learning_curves(results, "val_stft"))
    assert found[f"{entry(results, 'pruned').id} mean"].x.max() == 60
    assert f"{entry(results, 'broken').id} mean" not in found


def test_how_a_trial_ended_is_said_by_symbol_and_words(results):
    made = figures.learning_curves(results, "val_stft")
    symbols = {
        s: marks(made, s).marker.symbol for s in ("finished", "stopped", "failed", "diverged")
    }
    assert len({*symbols.values()}) == 4
    assert "pruned by ASHA" in marks(made, "stopped").text[0]
    assert "loss was NaN" in marks(made, "diverged").text[0]
    told = {t.name for t in made.data if t.showlegend is None}
    assert {"finished", "stopped", "failed", "diverged", "unprocessed input"} <= told
    assert len(marks(made, "finished").x) == 7


def test_a_trial_that_failed_before_its_first_value_is_there_all_the_same(results):
    mark = marks(figures.learning_curves(results, "val_stft"), "failed")
    assert list(mark.x) == [5]
    assert "no value before" in mark.text[0]
    assert "ValueError: &lt;i&gt;no&lt;/i&gt;" in mark.text[0]


def test_one_that_diverged_does_not_flatten_the_others_and_is_still_seen(results):
    for name in ("val_stft", "loss"):
        made = figures.learning_curves(results, name)
        low, high = made.layout.yaxis.range
        assert high < 10
        mark = marks(made, "diverged")
        assert low < mark.y[0] < high
        assert "1 trial with values above what is shown (to 1e+" in made.layout.xaxis.title.text
    assert "no number" in mark.text[0]


def drawn(tmp_path, values, states=("finished",)):
    """The axis' range and the words below it, of trials with these values of a score, made
    `values(trial's number, step)` of 1000 steps: each logged, each 100th evaluated."""
    url = str(tmp_path / "sweep")
    variants = [Made(f"v{i}", {"optim.lr": 0.1 + i}, state=state) for i, state in enumerate(states)]
    make(url, variants, seeds=1, log_every=1, items=2, clips=0)
    for entry in Reader(url).read().entries:
        rewrite(
            entry.trials[0],
            lambda line, i=entry.number: (
                {**line, "loss": values(i, line["step"])}
                if "loss" in line
                else {**line, "val": {"val_stft": values(i, line["step"])}}
            ),
        )
    made = {
        name: figures.learning_curves(Reader(url).read(), name) for name in ("loss", "val_stft")
    }
    return {
        name: (*figure.layout.yaxis.range, figure.layout.xaxis.title.text)
        for name, figure in made.items()
    }


def test_what_changes_late_is_on_the_axis_though_most_values_are_the_same(tmp_path):
    def rate(_, step):
        return 1.0 if step <= 800 else (1000 - step) / 200

    for low, high, text in drawn(tmp_path, rate, ("finished",) * 3).values():
        assert low < 0.0
        assert high > 1.0
        assert "values" not in text


@pytest.mark.parametrize("state", ["finished", "diverged"])
def test_a_trial_that_is_not_flat_is_on_the_axis_though_the_others_are(tmp_path, state):
    def rising(i, step):
        return step * 9e-4 if i == 3 else 0.0

    states = [state if i == 3 else "finished" for i in range(7)]
    for low, high, text in drawn(tmp_path, rising, states).values():
        assert low < 0.0
        assert 0.9 < high < 1.1
        assert "values" not in text


def test_a_spike_is_on_the_axis_or_noted(tmp_path):
    def spiky(i, step):
        return 1.9 if step == 300 else (step * 0.37 + i / 3) % 1.0

    for _, high, text in drawn(tmp_path, spiky, ("finished",) * 7).values():
        assert high > 1.9
        assert "values" not in text


def test_a_few_values_that_would_flatten_their_own_curve_are_noted(tmp_path):
    def values(_, step):
        return 1e9 if step == 333 else 5.0 / step

    low, high, text = drawn(tmp_path, values)["loss"]
    assert 5.0 < high < 6.0
    assert "1 trial with values above what is shown (to 1e+09)" in text


def test_a_part_of_a_curve_is_on_the_axis_however_flat_the_rest_is(tmp_path):
    def values(_, step):
        return 1.0 + 1e-5 * np.sin(step) if step <= 900 else (1000 - step) / 100

    low, high, text = drawn(tmp_path, values, ("finished",) * 2)["loss"]
    assert low < 0.0 < 1.0 < high
    assert "values" not in text


def test_beside_flat_lines_the_unprocessed_input_has_its_place(tmp_path):
    low, high, text = drawn(tmp_path, lambda *_: 0.0)["val_stft"]
    assert low < 0.0 < 2.0 < high
    assert "unprocessed" not in text


@pytest.mark.parametrize("height", [1.0, 2.5, 3.5, 40.0, 1e9])
def test_whatever_lies_outside_is_noted(tmp_path, height):
    def broken(i, step):
        return height if i == 2 and step == 700 else -height if step == 300 and i == 2 else 1.0 / (
            1 + step * 0.01
        )  # fmt: skip

    states = ("finished", "finished", "diverged", "finished")
    for low, high, text in drawn(tmp_path, broken, states).values():
        assert ("1 trial with values above what is shown" in text) == (high < height)
        assert ("1 trial with values below what is shown" in text) == (low > -height)
        assert high - low < 5.0


def test_one_that_explodes_unnoticed_does_not_flatten_the_only_other_one(tmp_path):
    def values(i, step):
        return 1e9 if i and step > 500 else 5.0 / step

    for _, high, text in drawn(tmp_path, values, ("finished", "running")).values():
        assert high < 6.0
        assert "1 trial with values above what is shown (to 1e+09)" in text


def test_hundreds_that_were_stopped_early_do_not_hide_those_that_went_on(tmp_path):
    url = str(tmp_path / "sweep")
    stopped = [Made(f"v{i}", {"optim.lr": 0.1 + i}, state="stopped", until=100) for i in range(30)]
    make(url, [Made("baseline"), *stopped], seeds=1, items=2, clips=0)
    results = Reader(url).read()
    for entry in results.entries:
        rewrite(entry.trials[0], lambda line: {**line, "loss": 5e3 / line["step"] ** 2 + 1e-4})
    results = Reader(url).read()
    made = figures.learning_curves(results, "val_stft")
    _, last = results.curve(results.entries[0].trials[0], "val_stft")
    assert made.layout.yaxis.range[0] < last.min()


def test_names_that_would_leave_no_room_for_curves_are_not_in_the_legend(tmp_path):
    for number in (figures.FEW, figures.FEW + 1):
        url = str(tmp_path / f"sweep{number}")
        made = [Made(f"{i} {LONG}", {"optim.lr": 0.1 + i}) for i in range(number)]
        make(url, made, seeds=1, steps=100, items=2, clips=0)
        made = figures.learning_curves(Reader(url).read(), "val_stft")
        names = [t.name for t in made.data if t.showlegend and t.mode == "lines"]
        assert len([n for n in names if "…" in n]) == (number if number <= figures.FEW else 1)
        assert made.layout.legend.maxheight <= 0.25


def test_a_gap_stays_a_gap(results):
    trial = entry(results, "broken").trials[0]
    line = lines(figures.learning_curves(results, "loss"))[trial.id]
    assert np.isnan(line.y[line.x > 80]).all()
    assert np.isfinite(line.y[line.x <= 60]).all()


def test_text_of_others_is_neither_html_nor_a_template(results):
    text = figures.learning_curves(results, "val_stft").to_json()
    assert "<b>" not in json.loads(text)["data"].__repr__()
    assert "%{x} " not in text
    assert "<i>no" not in text


def test_only_the_pointer_template_is_a_template(results):
    for trace in figures.learning_curves(results, "val_stft").data:
        assert "long" not in (trace.hovertemplate or "")


def test_the_unprocessed_input_is_a_dotted_line_of_scores_only(results):
    made = figures.learning_curves(results, "val_stft")
    (line,) = [t for t in made.data if t.uid == "unprocessed"]
    assert {*line.y} == {2.0}
    assert line.line.dash == "dot"
    assert "unprocessed input: 2.0000, above" in made.layout.xaxis.title.text
    assert not [t for t in figures.learning_curves(results, "loss").data if t.uid == "unprocessed"]


def test_which_way_is_better_is_said_of_scores_only(results):
    titles = {
        name: figures.learning_curves(results, name).layout.yaxis.title.text
        for name in ("val_stft", "val_si_sdr", "loss")
    }
    assert titles == {
        "val_stft": "val_stft (lower is better)",
        "val_si_sdr": "val_si_sdr (higher is better)",
        "loss": "loss",
    }


def test_rungs_are_lines_by_step_only(results):
    assert [s.x0 for s in figures.learning_curves(results, "val_stft").layout.shapes] == [60]
    assert figures.learning_curves(results, "val_stft", "minutes").layout.shapes == ()


def test_by_minutes_a_curve_is_where_its_clock_was(results):
    trial = entry(results, "baseline").trials[0]
    made = figures.learning_curves(results, "val_stft", "minutes")
    line = lines(made)[trial.id]
    np.testing.assert_allclose(line.x, results.minutes(trial, line.customdata), rtol=1e-6)
    assert made.layout.xaxis.title.text.startswith("minutes of training")
    assert "step %{customdata}" in line.hovertemplate


def test_the_chosen_stand_out_and_the_baseline_stays(results):
    chosen = entry(results, LONG)
    made = figures.learning_curves(results, "val_stft", chosen=[chosen.id])
    found = lines(made)
    strong = {
        uid.removesuffix(" mean")
        for uid, line in found.items()
        if uid.endswith("mean") and line.opacity > 0.9
    }
    assert strong == {chosen.id, entry(results, "baseline").id}
    assert found[f"{entry(results, 'pruned').id} mean"].opacity < 0.3
    assert list(marks(made, "diverged").marker.opacity) == [1.0]  # always seen
    everyone = figures.learning_curves(results, "val_stft", chosen=[])
    assert everyone.to_json() == figures.learning_curves(results, "val_stft").to_json()


def test_zoom_stays_while_the_sweep_goes_on_and_goes_with_another_name(results):
    one, other = (figures.learning_curves(results, name) for name in ("val_stft", "loss"))
    assert one.layout.uirevision == figures.learning_curves(results, "val_stft").layout.uirevision
    assert one.layout.uirevision != other.layout.uirevision
    uids = [trace.uid for trace in one.data]
    assert len({*uids}) == len(uids)


def test_before_anything_is_logged_it_says_so(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a", state="waiting")], seeds=1, clips=0)
    made = figures.learning_curves(Reader(url).read(), "val_stft")
    assert made.data == ()
    assert "No trial has logged val_stft yet" in made.layout.annotations[0].text


def test_many_long_curves_are_thinned_drawn_on_webgl_and_keep_their_spikes(tmp_path):
    url = str(tmp_path / "sweep")
    variants = [Made(f"v{i}", {"optim.lr": i * 1e-3}) for i in range(12)]
    make(url, variants, seeds=1, steps=3000, log_every=1, evaluations=3, items=2, clips=0)
    trial = next(iter(Reader(url).read().trials.values()))
    rewrite(trial, lambda line: {**line, "loss": 3.5} if line["step"] == 1501 else line)
    made = figures.learning_curves(Reader(url).read(), "loss")
    found = lines(made)
    assert all(len(line.x) <= figures.POINTS for line in found.values())
    assert {line.type for line in found.values()} == {"scattergl"}
    assert 3.5 in found[trial.id].y[found[trial.id].x == 1501]
    scores = figures.learning_curves(Reader(url).read(), "val_stft")
    assert {line.type for line in lines(scores).values()} == {"scatter"}


def test_a_damaged_trial_is_marked(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a"), Made("b", gain=0.1)], seeds=1, steps=100, clips=0)
    trial = Reader(url).read().entries[0].trials[0]
    storage.write_bytes(f"{trial.url}/run.json", b"{")
    mark = marks(figures.learning_curves(Reader(url).read(), "val_stft"), "damaged")
    assert len(mark.text) == 1
    assert "run.json: is damaged" in mark.text[0]
