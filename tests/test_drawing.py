"""Lines can be told apart, also by those who see few colours; text is text; no outlier spoils an
axis."""

import itertools

import numpy as np
import plotly.graph_objects as go
import pytest

from bgray import drawing
from bgray.drawing import COLOURS, bulk, escaped, shortened, style

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def linear(colours):
    """(N, 3) linear RGB of #rrggbb."""
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """(N, 3) CIE L*a*b* (D65) of linear RGB."""
    xyz = rgb @ np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    ).T / np.array([0.95047, 1.0, 1.08883])  # fmt: skip
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


def contrast_on_white(colours):
    return 1.05 / (linear(colours) @ LUMINANCE + 0.05)


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_first_eight_colours_can_be_told_apart(sight):
    seen = lab(np.clip(linear(COLOURS) @ SIGHTS[sight].T, 0, 1))
    least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert least > 24


def test_the_measure_knows_colours_that_are_confused():
    red, green = lab(np.clip(linear(["#c83200", "#7d7300"]) @ SIGHTS["deuteranopia"].T, 0, 1))
    assert np.linalg.norm(red - green) < 12
    assert np.linalg.norm(np.subtract(*lab(linear(["#c83200", "#7d7300"])))) > 50


def test_lines_and_text_have_contrast_on_white():
    assert contrast_on_white(COLOURS).min() >= 3.0
    assert contrast_on_white([drawing.GOOD, drawing.BAD, drawing.NEUTRAL]).min() >= 3.0
    assert contrast_on_white([drawing.INK, drawing.SMALL]).min() >= 4.5
    assert contrast_on_white(["#767676"])[0] == pytest.approx(4.54, abs=0.01)


def test_beyond_the_colours_dash_and_symbol_change():
    looks = [style(number) for number in range(48)]
    assert len({(look.colour, look.dash) for look in looks}) == 48
    assert len({(style(n).colour, style(n).symbol) for n in range(64)}) == 64
    assert len({look.symbol for look in looks[:8]}) == 8
    assert style(0).dash == "solid"
    assert style(10_000) == style(10_000)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b> & y", "&lt;b&gt;x&lt;/b&gt; &amp; y"),
        ("%{x} 5%", "&#37;{x} 5%"),
        ("lr 0.1 → 0.2", "lr 0.1 → 0.2"),
    ],
)
def test_text_is_shown_letter_by_letter(text, shown):
    assert escaped(text) == shown


def test_a_long_name_keeps_both_ends():
    assert shortened("short") == "short"
    assert shortened("a" * 20 + "b" * 20, 11) == "aaaaaa…bbbb"
    assert shortened("two\n lines") == "two lines"
    assert all(len(shortened("x" * 99, most)) == most for most in range(4, 60))


def test_text_is_broken_between_words_and_escaped():
    assert drawing.wrapped("one <two> three", 9) == "one &lt;two&gt;<br>three"


@pytest.mark.parametrize("spoiler", [1e9, 1e38, np.inf, np.nan])
def test_one_that_diverged_does_not_stretch_the_range(spoiler):
    values = np.r_[np.linspace(0.4, 0.8, 50), spoiler]
    assert bulk(values) == pytest.approx((0.4, 0.8))


def test_what_belongs_together_is_all_inside():
    decay = 5 * np.exp(-np.linspace(0, 1, 100))
    assert bulk(decay) == pytest.approx((decay.min(), decay.max()))
    assert bulk(np.array([np.nan, np.inf])) is None
    assert bulk(np.full(9, 2.0)) == (2.0, 2.0)
    low, high = drawing.padded(2.0, 2.0)
    assert low < 2 < high


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9, 0.99])
def test_where_most_values_are_the_same_the_others_are_inside(share):
    same = np.full(int(1000 * share), 1.0)
    assert bulk(np.r_[same, np.linspace(0, 1, 1000 - len(same))]) == (0.0, 1.0)
    assert bulk(np.r_[same, 7.0]) == (1.0, 7.0)
    assert bulk(np.r_[same, np.linspace(0, 2, 1000 - len(same)), 1e9]) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("spans", "range"),
    [
        ([(0.4, 5)], (0.4, 5)),
        ([(0.4, 5), (0.5, 1e9)], (0.4, 5)),
        ([(-1e9, 3), (-4, 3)], (-4, 3)),
        ([(0.4, 5), (0.3, 40)], (0.3, 40)),
        ([(1, 1), (2, 2), (5, 5)], (1, 5)),
        ([(0, 0)] * 6 + [(0, 0.9)], (0, 0.9)),
        ([(0, 0)] * 6 + [(0, 0.9), (0, 1e9)], (0, 0.9)),
        ([(1e-4, 1e-4), (1e-3, 1e-3), (1e-2, 1e-2), (0.1, 0.1)], (1e-4, 0.1)),
    ],
)
def test_curves_are_together_on_an_axis_on_which_a_usual_one_is_not_flat(spans, range):
    assert drawing.together(np.array(spans, float)) == pytest.approx(range)
    assert drawing.together(np.array(spans[::-1], float)) == pytest.approx(range)


def test_a_figure_has_no_title_and_no_background():
    made = drawing.figure(x="step", y="loss")
    assert isinstance(made, go.Figure)
    assert made.layout.title.text is None
    assert made.layout.paper_bgcolor == made.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert "system-ui" in made.layout.font.family


def test_notes_stand_under_the_axis():
    made = drawing.figure(x="step")
    drawing.note(made, [])
    assert made.layout.xaxis.title.text == "step"
    drawing.note(made, ["1 < 2"])
    assert "1 &lt; 2" in made.layout.xaxis.title.text
    assert made.layout.annotations == ()
