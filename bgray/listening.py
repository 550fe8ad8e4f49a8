"""What the page's listening strip asks its server for: clips with their loudness, blind tests, and
what ears have said so far."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import flask
from werkzeug.exceptions import HTTPException

from bgray import blind
from bgray.answers import Heard as Heard
from bgray.answers import results_of as results_of
from bgray.clips import NAME, TYPES, Choice, Clip, Source, choose, content, level, url_of, version
from bgray.hearing import Level, matched
from bgray.problems import ConfigError

PREFIX = "/api/listening"
MOST_BYTES = 16 * 1024  # of a request's body
MOST_SESSIONS = 64  # of blind tests that are held; the oldest is given up
MOST_SOUND = 256 * 2**20  # bytes that they hold together; others make theirs anew when asked

Find = Callable[[str], Source]
"""A sweep by the name the page has for it; LookupError where there is none."""


def routes(app: flask.Flask, find: Find) -> None:
    """Register everything under /api/listening:

    GET  lanes?sweep=&variant=...&item=&source=&step=&seed=   what is heard together
    GET  file/<run>/<name>?sweep=        a clip; only names in the run's listing
    GET  heard?sweep=                    `results_of` the sweep
    POST blind                           begin a test: its first question
    POST blind/<session>                 an answer: the next question, or the result
    GET  blind/<session>/<token>         a sound of the question that is asked now
    """
    page = flask.Blueprint("listening", __name__, url_prefix=PREFIX)
    sessions: OrderedDict[str, blind.Test] = OrderedDict()
    lock = threading.Lock()

    def source() -> Source:
        return _found(find, flask.request.args.get("sweep", ""))

    @page.before_request
    def guard() -> None:
        _refuse_foreign(flask.request)

    @page.after_request
    def harden(response: flask.Response) -> flask.Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response

    @page.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Any:
        return {"error": error.description or error.name}, error.code or 500

    @page.errorhandler(blind.Refused)
    def not_so(error: blind.Refused) -> Any:
        return {"error": str(error)}, 400

    @page.errorhandler(blind.Later)
    def not_now(error: blind.Later) -> Any:
        return {"error": str(error)}, 503

    @page.errorhandler(OSError)
    def storage_failed(error: OSError) -> Any:
        return {"error": f"storage: {error}"}, 502

    @page.errorhandler(ConfigError)
    def sweep_damaged(error: ConfigError) -> Any:
        return {"error": str(error)}, 502

    @page.get("/lanes")
    def lanes() -> Any:
        args, sweep = flask.request.args, source()
        numbers = {name: args.get(name, type=int) for name in ("item", "step", "seed")}
        chosen = choose(
            sweep.runs, args.getlist("variant"), source=args.get("source") or None, **numbers
        )
        return _described(chosen, args.get("sweep", ""))

    @page.get("/file/<run>/<name>")
    def file(run: str, name: str) -> Any:
        trial = next((trial for trial in source().runs if trial.id == run), None)
        kind = NAME.fullmatch(name)
        if trial is None or kind is None or name not in trial.clips:
            flask.abort(404, "no such clip")
        try:
            data = content(url_of(Clip(trial, name)))
        except FileNotFoundError:
            flask.abort(404, "no such clip")
        return _sent(data, TYPES[kind[5]])

    @page.get("/heard")
    def heard() -> Any:
        return results_of(source().url).to_json()

    @page.post("/blind")
    def begin() -> Any:
        asked = _body()
        test = blind.begin(_found(find, str(asked.get("sweep", ""))), asked)
        question = test.ask()
        with lock:
            sessions[test.id] = test
            while len(sessions) > MOST_SESSIONS:
                sessions.popitem(last=False)
        let_go()
        return question

    def session(name: str) -> blind.Test:
        with lock:
            test = sessions.get(name)
            if test is not None:
                sessions.move_to_end(name)
        if test is None:
            text = "this test is not known any more (the page's server was started anew?)"
            flask.abort(404, text)
        return test

    def let_go() -> None:
        """Of what was used longest ago first; the session that was used last keeps its sounds."""
        with lock:
            held = 0
            for i, test in enumerate(reversed(sessions.values())):
                held += test.held
                if i and held > MOST_SOUND:
                    held -= test.held
                    test.made = []

    @page.post("/blind/<name>")
    def answer(name: str) -> Any:
        given = _body()
        try:
            return session(name).answer(given.get("number"), given.get("answer"))
        finally:
            let_go()

    @page.get("/blind/<name>/<token>")
    def sound(name: str, token: str) -> Any:
        data = session(name).sound(token)
        let_go()
        if data is None:
            flask.abort(404, "this question has been answered")
        return _sent(data, TYPES["wav"])

    app.register_blueprint(page)


def _found(find: Find, name: str) -> Source:
    try:
        return find(name)
    except LookupError:
        flask.abort(404, "no such sweep")


def _sent(data: bytes, kind: str) -> flask.Response:
    """With ranges, and without a name, a time or a tag that would tell one sound from another."""
    return flask.send_file(io.BytesIO(data), kind, conditional=True, etag=False)


def _refuse_foreign(request: flask.Request) -> None:
    """Another site's page must not answer for this one: a POST comes from a page of this origin,
    and browsers say so."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is None and origin is None:
        flask.abort(403, "only a page of this server may ask for that")
    if site not in (None, "same-origin") or (
        origin is not None and urlsplit(origin).netloc != request.host
    ):
        flask.abort(403, "only a page of this server may ask for that")
    if request.mimetype != "application/json":
        flask.abort(415, "JSON only")
    if request.content_length is None or request.content_length > MOST_BYTES:
        flask.abort(413, f"at most {MOST_BYTES} bytes, and their number beforehand")


def _body() -> dict[str, Any]:
    found = flask.request.get_json(silent=True)
    if not isinstance(found, dict):
        flask.abort(400, "one JSON object")
    return found


def _described(chosen: Choice, sweep: str) -> dict[str, Any]:
    """For the page. Of a clip that cannot be read the reason is there instead of its loudness."""
    kinds = [*chosen.references, *("lane" for _ in chosen.lanes)]
    every = [*chosen.references.values(), *chosen.lanes]
    names = [o.run.label if k == "lane" else k for k, o in zip(kinds, every, strict=True)]
    levels: list[Level | None] = []
    errors: list[str | None] = []
    for one in every:
        try:
            levels.append(level(one))
            errors.append(None)
        except (OSError, ValueError) as error:
            levels.append(None)
            errors.append(str(error))
    known = [i for i, found in enumerate(levels) if found is not None]
    target = next((k for k, i in enumerate(known) if kinds[i] == "target"), None)
    equal = matched([found for found in levels if found is not None], target)
    gains = dict(zip(known, equal.gains_db, strict=True))

    def address(one: Clip, name: str) -> str:
        stamp = version(one, name)
        return (
            f"{PREFIX}/file/{quote(one.run.id)}/{quote(name)}"
            f"?sweep={quote(sweep, safe='')}&v={stamp}"
        )

    lanes = []
    for i, one in enumerate(every):
        found, kind = levels[i], kinds[i]
        picture = one.picture
        lanes.append(
            {
                "kind": kind,
                "label": names[i],
                "variant": one.run.variant if kind == "lane" else None,
                "run": one.run.id if kind == "lane" else kind,
                "seed": one.run.seed if kind == "lane" else None,
                "url": address(one, one.name),
                "picture": address(one, picture) if picture else None,
                "lufs": None if found is None or found.silent else round(found.lufs, 2),
                "silent": found is not None and found.silent,
                "gain_db": round(gains.get(i, 0.0), 4),
                "error": errors[i],
            }
        )
    return {
        "lanes": lanes,
        "item": chosen.item,
        "items": chosen.items,
        "source": chosen.source,
        "sources": chosen.sources,
        "step": chosen.step,
        "steps": chosen.steps,
        "seed": chosen.seed,
        "seeds": chosen.seeds,
        "missing": [{"label": label, "why": why} for label, why in chosen.missing],
        "goal_lufs": None if equal.goal_lufs is None else round(equal.goal_lufs, 2),
        "trim_db": round(equal.trim_db, 4),
        "trim_of": None if equal.cause is None else names[known[equal.cause]],
        "reference": "target" if target is not None else "quietest",
    }
