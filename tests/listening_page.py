"""A sweep's folder with clips of known sound, and a small page with nothing but the strip."""

import contextlib
import io
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

import flask
import numpy as np
import soundfile
from browser import Seen
from werkzeug.serving import make_server

from bgray import listening
from bgray.encoding import to_int16, wav

ASSETS = Path(listening.__file__).parent / "assets"
SCRIPTS = ("blind", "player", "spectrogram", "strip", "strip_view")  # in Dash's order
RATE = 16000
VARIANTS = ("one", "two", "three")


@dataclass
class Trial:
    id: str
    url: str
    variant: str
    label: str
    seed: int
    scores: dict = field(default_factory=dict)
    only: tuple[str, ...] | None = None

    @property
    def clips(self):
        if self.only is not None:
            return self.only
        folder = Path(self.url, "clips")
        return tuple(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else ()


@dataclass
class Sweep:
    url: str
    runs: list[Trial]
    name: str = "a sweep/with ü"
    baseline: str = "one"
    metric: str = "val_stft"
    mode: str = "min"


def tone(hz, seconds=1.0, amplitude=0.2, rate=RATE):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def put(run, name, audio, rate=RATE):
    """(T,) or (C, T) as 16 bits; gives what the file holds, (C, T) float."""
    folder = Path(run.url, "clips")
    folder.mkdir(parents=True, exist_ok=True)
    data = wav(to_int16(np.atleast_2d(audio)), rate)
    (folder / name).write_bytes(data)
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T


def sweep(folder, *, seeds=(0, 1), steps=(50, 100), items=(0, 4)):
    """Three variants whose clips are tones of 300, 400, 500 Hz at 0.2, 0.1 and 0.05; the target is
    200 Hz and the input 250 Hz at 0.2."""
    runs = []
    for v, variant in enumerate(VARIANTS):
        for seed in seeds:
            id = f"{v}{seed}".rjust(12, "a")
            run = Trial(id, f"{folder}/{id}", variant, f"variant {variant}", seed)
            for item in items:
                put(run, f"{item:03d}-input.wav", tone(250))
                put(run, f"{item:03d}-target.wav", tone(200))
                for step in steps:
                    put(run, f"{item:03d}-step-{step:06d}.wav", tone(300 + 100 * v, 1, 0.2 / 2**v))
            run.scores = {
                step: {
                    "val_stft": [0.1 * (v + 1) + 0.01 * i for i in range(5)],
                    "val_si_sdr": [None, 1, 2, 3, 10.0 - v],
                }
                for step in steps
            }
            runs.append(run)
    return Sweep(str(folder), runs)


def app(made, log=None):
    """Serves the strip of one sweep; `log` gets the path of every request."""
    server = flask.Flask("strip", static_folder=str(ASSETS), static_url_path="/assets")
    listening.routes(server, lambda name: {made.name: made}[name])
    if log is not None:
        server.before_request(lambda: log.append(flask.request.full_path))

    @server.get("/")
    def page():
        lanes = [
            {"variant": v, "label": f"variant {v}", "colour": c, "seed": 0}
            for v, c in zip(VARIANTS, ("#0072b2", "#d55e00", "#009e73"), strict=True)
        ]
        scripts = "".join(f'<script src="/assets/{name}.js"></script>' for name in SCRIPTS)
        return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>strip</title>
            <link rel="icon" href="data:,"><link rel="stylesheet" href="/assets/listening.css">
            <input id="text" aria-label="text"><div id="strip"></div>{scripts}<script>
            window.strip = bgrayListening.mount(document.getElementById("strip"),
                {{api: "/api/listening"}});
            window.shown = bgrayListening.show({{sweep: {json.dumps(made.name)},
                lanes: {json.dumps(lanes)}}});</script></html>"""

    return server


# --- in a browser


@contextlib.contextmanager
def serving(folder):
    """(the sweep, its page's address, what was asked for), answering; every lane is noise, which
    tells one sample from the next."""
    made, log = sweep(folder / "sweep"), []
    for seed in (0, 1):
        for v in range(3):
            run = made.runs[2 * v + seed]
            for step in (50, 100):
                noise = np.random.default_rng([v, seed, step]).standard_normal(RATE)
                put(run, f"000-step-{step:06d}.wav", 0.2 / 2**v * np.clip(noise / 4, -1, 1))
    server = make_server("127.0.0.1", 0, app(made, log), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made, f"http://127.0.0.1:{server.server_port}/", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def opened(browser, address):
    """The page, once its clips are there; a script's error or a request elsewhere fails the
    test."""
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    tab.set_default_timeout(60_000)
    seen, errors = Seen(tab), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    # Requests are intercepted from the start: a test's own route, added later, then holds for the
    # very next one. While Chromium turns interception on, a request may still pass.
    tab.route("**/nothing-asks-for-this", lambda route: route.abort())
    tab.goto(address)
    tab.evaluate("window.shown")
    tab.wait_for_function("window.strip.drawn !== undefined")
    yield tab
    tab.close()
    assert not errors
    assert seen.hosts == {address.split("/")[2]}


def samples(made, label, step=100):
    """(T,) float32 of what the file holds."""
    run = next(run for run in made.runs if run.label == label and run.seed == 0)
    path = Path(run.url, "clips", f"000-step-{step:06d}.wav")
    return soundfile.read(path, dtype="float32")[0]


def state(page):
    return page.evaluate(
        """() => ({
            heard: strip.cards[strip.player.heard].label,
            pressed: strip.cards.filter((c) => c.button.getAttribute("aria-pressed") === "true")
                .map((c) => c.label),
            open: strip.player.voices
                ? strip.player.voices.lanes.map(({open}) => open.to) : null,
            playing: strip.player.playing, loop: strip.player.loop, region: strip.region,
            view: strip.view, at: strip.player.position(), gains: strip.player.gains,
        })"""
    )


TAP = """async () => {
    // Everything that leaves the graph, with the frame it left at.
    const {player} = strip;
    player.context ??= new AudioContext({sampleRate: player.rate});
    const code = `registerProcessor("tap", class extends AudioWorkletProcessor {
        process([[data]]) {
            if (data) this.port.postMessage([currentFrame, data.slice()]);
            return true;
        }
    })`;
    await player.context.audioWorklet.addModule(URL.createObjectURL(new Blob([code],
        {type: "text/javascript"})));
    const tap = new AudioWorkletNode(player.context, "tap");
    window.tapped = [];
    window.tap = tap;
    tap.port.onmessage = ({data}) => tapped.push(data);
    player.play();
    player.voices.all.connect(tap);
}"""
