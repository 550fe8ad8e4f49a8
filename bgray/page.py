"""The dashboard's page: its frame, the figures' callbacks, and what its scripts ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dash
import flask

# pyarrow imports pandas when it first needs it. That must not be in one thread of the server while
# plotly, in another one, uses the half of it that is there.
import pandas as pandas
import plotly.graph_objects as go
from dash import dcc, html
from dash.dependencies import Input, Output

from bgray import details, figures, listening, overview
from bgray.problems import ConfigError
from bgray.results import Results
from bgray.variants import Run
from bgray.verdicts import Mode
from bgray.watching import Watch

ASSETS = Path(__file__).parent / "assets"
# dcc.Graph's own: no link to the maker's service, and pictures that fit a slide.
GRAPH = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"scale": 2}}

# The frame is plain HTML: it is on the screen before Dash has begun, scripts can own what is in it,
# and headings, language and landmarks are there without it. Dash's part is the figures.
FRAME = (ASSETS / "page.html").read_text()


def build(watch: Watch) -> dash.Dash:
    """The app; `.server` is the Flask app that answers for it."""
    app = dash.Dash(
        "bgray.dashboard",
        title="bgray",
        update_title=None,  # type: ignore[arg-type]  # None: the title stays as it is
        assets_folder=str(ASSETS),
        assets_ignore=r"^report|\.html$",
        use_pages=False,
        serve_locally=True,
        index_string=FRAME,
        enable_mcp=False,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    app.layout = _layout
    _callbacks(app, watch)
    _routes(app.server, watch)
    listening.routes(app.server, lambda name: _heard(watch.look(name)[1]))
    return app


def _layout() -> html.Div:
    def panel(id: str, title: str, wide: bool) -> html.Section:
        controls = html.Div(id=f"{id}-controls", className="controls")  # page.js fills it
        head = html.Div([html.H2(title, id=f"{id}-title"), controls], className="panel-head")
        graph = dcc.Graph(id=id, config=GRAPH, figure=_empty("reading…"), className="graph")  # type: ignore[arg-type]
        named: Any = {"aria-labelledby": f"{id}-title"}
        box = html.Div(graph, id=f"{id}-scroll")
        return html.Section([head, box], className="panel wide" if wide else "panel", **named)

    # page.js writes into a figure's store what it is to show; Dash then asks for that figure alone.
    stores = [dcc.Store(id=f"{id}-view") for id in ("curves", "quality", "parallel")]
    return html.Div(
        [
            *stores,
            panel("curves", "Learning curves", True),
            panel("quality", "Quality and cost", False),
            panel("parallel", "What varies", True),
        ],
        className="figures",
    )


def _callbacks(app: dash.Dash, watch: Watch) -> None:
    """A view is {"sweep", "version", "chosen": [variant ids], ...}."""

    def drawn(id: str, draw: Callable[[Results, dict[str, Any]], go.Figure]) -> None:
        @app.callback(Output(id, "figure"), Input(f"{id}-view", "data"))
        def figure(view: dict[str, Any] | None) -> Any:
            if not view:
                return dash.no_update
            try:
                results = watch.look(view["sweep"])[1]
            except (LookupError, ConfigError, OSError):
                return dash.no_update  # page.js says what is wrong; here the last figure stays
            # With the same uirevision a zoom survives what only adds to the figure.
            same = [str(view[key]) for key in sorted(view) if key not in ("version", "chosen")]
            return draw(results, view).update_layout(uirevision=" ".join(same))

    def curves(results: Results, view: dict[str, Any]) -> go.Figure:
        name = view.get("name")
        name = name if name in results.curve_names() else results.metric
        if name is None:
            return _empty("nothing is logged yet")
        axis = "minutes" if view.get("axis") == "minutes" else "step"
        return figures.learning_curves(results, name, axis, view.get("chosen") or None)

    def quality(results: Results, metric: str, view: dict[str, Any]) -> go.Figure:
        cost = "minutes" if view.get("cost") == "minutes" else "vram"
        return figures.quality_cost(results, metric, cost, view.get("chosen") or None)

    def parallel(results: Results, metric: str, view: dict[str, Any]) -> go.Figure:
        return figures.parallel(results, metric, view.get("chosen") or None)

    def compared(draw: Callable[[Results, str, dict[str, Any]], go.Figure]) -> Any:
        def figure(results: Results, view: dict[str, Any]) -> go.Figure:
            metric = _compared(results, view)
            if metric is None:
                return _empty(results.why_not or "nothing can be compared yet")
            return draw(results, metric, view)

        return figure

    drawn("curves", curves)
    drawn("quality", compared(quality))
    drawn("parallel", compared(parallel))


def _compared(results: Results, view: dict[str, Any]) -> str | None:
    """The score that the view asks for, else the sweep's own; None while there is no comparison."""
    asked = view.get("metric")
    metric = asked if asked in results.comparisons else results.metric
    return metric if metric in results.comparisons else None


def _empty(text: str) -> go.Figure:
    figure = go.Figure()
    figure.add_annotation(text=text.replace("<", "&lt;"), showarrow=False, font_size=14)
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin=dict.fromkeys("lrtb", 8)
    )
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def _routes(app: flask.Flask, watch: Watch) -> None:
    @app.before_request
    def one_page() -> None:
        # Dash answers any path with its page; what there is not is to be said.
        if flask.request.endpoint == "/<path:path>":
            flask.abort(404)

    @app.get("/api/state")
    def state() -> Any:
        """The sweep `sweep` (else the first one) with its version and the names of all; 204 where
        the page has seen that version already."""
        names = watch.names()
        asked = flask.request.args.get("sweep") or ""
        name = asked if asked in names else next(iter(names), None)
        common = {"sweeps": names, "sweep": name, "seconds": watch.seconds, "folder": watch.url}
        if name is None:
            return {**common, "version": "none"}
        try:
            version, results = watch.look(name)
        except (ConfigError, OSError) as error:
            return {**common, "version": "none", "error": str(error)}
        version = f"{version}-{len(names)}"
        if flask.request.args.get("seen") == version:
            return "", 204
        found = overview.described(results, listening.results_of(results.url))
        return {**common, "version": version, **found}

    @app.get("/api/trial")
    def trial() -> Any:
        args = flask.request.args
        try:
            _, results = watch.look(args.get("sweep") or "")
            return details.of(results, results.trials[args.get("run") or ""])
        except LookupError:
            return {"error": "no such trial"}, 404
        except (ConfigError, OSError) as error:
            return {"error": str(error)}, 502


# --- what the listening strip knows of a sweep


@dataclass(frozen=True)
class HeardTrial:
    """As clips.Trial wants it."""

    id: str
    url: str
    variant: str
    label: str
    seed: int
    clips: tuple[str, ...]
    run: Run | None

    @property
    def scores(self) -> dict[int, dict[str, list[float | None]]]:
        return self.run.scores if self.run else {}


@dataclass(frozen=True)
class HeardSweep:
    """As clips.Source wants it."""

    url: str
    name: str
    runs: list[HeardTrial]
    baseline: str | None
    metric: str | None
    mode: Mode | None


def _heard(results: Results) -> HeardSweep:
    runs = [
        HeardTrial(t.id, t.url, t.variant, t.label, t.seed, t.clips, t.run)
        for t in results.trials.values()
    ]
    base, metric = results.baseline, results.metric
    mode = results.scores.get(metric or "")
    return HeardSweep(results.url, results.name, runs, base.id if base else None, metric, mode)
