"""Box plots of runs side by side, by target over tracks, as an SVG."""

import io
import math
from collections.abc import Mapping
from typing import Any

from bgray.bss import FRAME_METRICS, Scores, median, values

FIRST = "vocals"
"""The target that runs are sorted by, where there is one, as the logs did."""


def box_plot(runs: Mapping[str, Mapping[str, Scores]]) -> bytes:
    """Run to track to scores (`bgray.bss.score_track`) -> an SVG of a panel per frame metric.

    A box spans the quartiles over tracks around their median, whiskers the values within 1.5 of
    its length, dots what lies beyond. Best run first. Infinite scores cannot be drawn and are left
    out; the same scores give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    runs = {name: runs[name] for name in by_score(runs)}
    targets = _targets(runs)
    if not targets:
        raise ValueError("runs: no scores to plot")
    width = 0.8 / len(runs)
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    style: Any = {"svg.hashsalt": "bgray", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(max(8.0, 0.5 * len(runs) * len(targets)), 7), layout="constrained")
        panels = figure.subplots(2, 2).flat
        handles = []
        for panel, metric in zip(panels, FRAME_METRICS, strict=True):
            handles = []
            for i, (name, tracks) in enumerate(runs.items()):
                drawn = panel.boxplot(
                    [[v for v in values(tracks, t, metric) if math.isfinite(v)] for t in targets],
                    positions=[x + (i + 0.5) * width - 0.4 for x in range(len(targets))],
                    widths=0.85 * width,
                    patch_artist=True,
                    medianprops={"color": "black"},
                    flierprops={"marker": ".", "markersize": 3},
                )
                for box in drawn["boxes"]:
                    box.set_facecolor(colors[i % len(colors)])
                for target, line in zip(targets, drawn["medians"], strict=True):
                    line.set_gid(f"{metric}-{target}-{name}")
                handles.append(drawn["boxes"][0])
            panel.set_title(f"{metric} (dB, higher is better)")
            panel.set_xticks(range(len(targets)), targets)
            panel.grid(axis="y", alpha=0.3)
        most = max(len(tracks) for tracks in runs.values())
        figure.suptitle(f"medians over frames, {most} track{'s' * (most != 1)}")
        figure.legend(handles, list(runs), loc="outside lower center", ncols=min(4, len(runs)))
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def by_score(runs: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """Runs by their median SDR of the vocals, or over all targets where none is called so; best
    first, those without a score last."""

    def score(name: str) -> float:
        targets = _targets(runs)
        chosen = [FIRST] if FIRST in targets else targets
        found = median([median(values(runs[name], target, "SDR")) for target in chosen])
        return -math.inf if math.isnan(found) else found

    return sorted(runs, key=score, reverse=True)


def _targets(runs: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    tracks = [scores for tracks in runs.values() for scores in tracks.values()]
    return list(dict.fromkeys(target for scores in tracks for target in scores))
