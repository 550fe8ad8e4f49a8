"""The plot shows what the scores say: order, medians, and every name."""

import math
import re
from xml.etree import ElementTree

import pytest

from bgray.boxplot import box_plot, by_score


def scores(sdr, **others):
    """A track's scores with `sdr` for every metric."""
    return {
        target: dict.fromkeys(("SDR", "ISR", "SIR", "SAR", "uSDR", "SI-SDR"), value)
        for target, value in {"vocals": sdr, **others}.items()
    }


RUNS = {
    "weak": {f"track {i}": scores(1.0 + i, bass=9.0 + i) for i in range(5)},
    "strong": {f"track {i}": scores(6.0 + i, bass=2.0 + i) for i in range(5)},
}


def median_heights(svg, metric):
    """(target, run) to the height of its median line on the page."""
    found = {}
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        name = group.get("id", "")
        if name.startswith(f"{metric}-"):
            path = next(group.iter("{http://www.w3.org/2000/svg}path")).get("d")
            if path:  # a box of nothing has none
                found[tuple(name.split("-")[1:])] = -float(re.findall(r"[-\d.]+", path)[1])
    return found


@pytest.mark.parametrize("metric", ["SDR", "ISR", "SIR", "SAR"])
def test_medians_lie_as_high_as_they_are(metric):
    height = median_heights(box_plot(RUNS), metric)
    assert len(height) == 4
    per_db = height["vocals", "strong"] - height["vocals", "weak"]  # 8 and 3 dB
    assert per_db > 0
    assert height["bass", "weak"] - height["bass", "strong"] == pytest.approx(per_db * 7 / 5)
    assert height["bass", "weak"] - height["vocals", "strong"] == pytest.approx(per_db * 3 / 5)


def test_runs_stand_by_their_vocals_and_without_vocals_by_all_targets():
    assert by_score(RUNS) == ["strong", "weak"]
    bass_only = {
        run: {track: {"bass": x["bass"]} for track, x in tracks.items()}
        for run, tracks in RUNS.items()
    }
    assert by_score(bass_only) == ["weak", "strong"]
    assert by_score({"none": {"t": scores(None)}, **RUNS})[-1] == "none"


def test_the_same_scores_give_the_same_bytes_and_every_name_is_text():
    svg = box_plot(RUNS)
    assert svg == box_plot(RUNS)
    text = svg.decode()
    for name in ("weak", "strong", "vocals", "bass", "SDR (dB, higher is better)", "5 tracks"):
        assert f">{name}" in text or f"{name}<" in text
    assert text.index(">strong<") < text.index(">weak<")


def test_what_has_no_score_or_an_infinite_one_leaves_the_others_where_they_are():
    odd = {"a": RUNS["weak"] | {"x": scores(None, bass=math.inf), "y": {}}, "b": RUNS["strong"]}
    plain = {"a": RUNS["weak"], "b": RUNS["strong"]}
    assert median_heights(box_plot(odd), "SDR") == median_heights(box_plot(plain), "SDR")


def test_a_target_that_never_plays_leaves_its_place_empty():
    silent = {"a": {"t": scores(3.0, drums=None)}}
    assert set(median_heights(box_plot(silent), "SAR")) == {("vocals", "a")}
    assert ">drums<" in box_plot(silent).decode()


def test_nothing_to_plot_is_an_error():
    with pytest.raises(ValueError, match="no scores to plot"):
        box_plot({"a": {}})
