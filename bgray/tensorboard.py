"""What TensorBoard shows of a sweep: curves by our own steps, what varies, sound and spectrograms.

Written from the runs' own folders into Tune's, one small file an evaluation, named by its step: a
sweep that goes on elsewhere finds what is there, and S3, which cannot append, gets each file once.
"""

import io
import itertools
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import soundfile
from PIL import Image

from bgray import event_files as files
from bgray import storage
from bgray.build import build_task
from bgray.growing import Growing
from bgray.records import METRICS, TIMING, read_info
from bgray.varying import Varying

if TYPE_CHECKING:
    from bgray.agenda import Agenda
    from bgray.search import Trial

PREFIX = "events.out.tfevents."
"""By which TensorBoard knows its files; it reads a folder's in the order of their names."""
FACTS = {
    "steps_per_second": "time/steps_per_second",
    "data_wait_share": "time/data_wait_share",
    "train_seconds": "time/train_seconds",
    "time_to_10k_steps": "time/seconds_to_10k_steps",
    "vram_peak_gib": "memory/vram_peak_gib",
    "rss_peak_gib": "memory/rss_peak_gib",
}
"""Of timing.jsonl, by tag."""
COLUMNS = ("time/steps_per_second", "time/seconds_to_10k_steps", "memory/vram_peak_gib")
"""Beside the scores, in the table of hyper-parameters."""
CLOSING_SECONDS = 60.0
LIVE, MISSED, LAST = range(3)
"""What is written first: of trials that run, of those that ran before; then it is over."""
LABEL_CHARACTERS = 60
FLOOR_DB = -100.0
WIDTH = 600  # most columns of a spectrogram


GOES_ON = ("waiting", "running", "interrupted")
"""States after which a run has not ended."""
END = "2-end"


def folder_of(sweep_folder: str) -> str:
    """What `tensorboard --logdir` is given."""
    return storage.join(sweep_folder, ".ray", "tune")


def dirname(trial: "Trial") -> str:
    """A trial's folder, and so its name in TensorBoard."""
    label = re.sub(r"[^\w.+=,-]+", "_", re.sub(r"[\[\]\"']", "", trial.label), flags=re.ASCII)
    short = label[:LABEL_CHARACTERS].strip("_.,")
    return "-".join(filter(None, [short, f"seed{trial.seed}", trial.id]))


def _kind(step: int) -> str:
    """By which a file's name says that it is of this step's evaluation."""
    return f"1-{step:08d}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")


class Events:
    """Told of the trials by their ids; writes in a thread of its own, so that the driver never
    waits for sound or for S3. Whatever goes wrong is said once, and ends nothing."""

    def __init__(self, agenda: "Agenda", say: Callable[[str], None] = print):
        self._agenda, self._say = agenda, say
        self._folder = folder_of(agenda.folder)
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]]
        self._jobs, self._number = queue.PriorityQueue(), itertools.count()
        self._thread: threading.Thread | None = None
        self._warned = False
        self._varying = Varying(agenda.sweep, agenda.variants)
        self._listed = 0
        """Variants that are in the table of hyper-parameters."""
        self._runs: dict[str, _Run] = {}
        self._there: dict[str, dict[int, str]] = {}
        """Run id to step to the name of its file."""
        self._places: dict[str, str] | None = None
        """Run id to its folder's name, of those that earlier sessions have made."""

    def start(self, run_id: str) -> None:
        self._later(lambda: self._start(self._agenda.trials[run_id]))

    def report(self, run_id: str, step: int, *, replayed: bool = False) -> None:
        """replayed: of an evaluation that an earlier session may have written already."""
        self._later(lambda: self._report(self._agenda.trials[run_id], step, replayed))

    def end(self, run_id: str, *, failed: bool = False) -> None:
        self._later(lambda: self._end(self._agenda.trials[run_id], failed))

    def values(self, trial: "Trial") -> dict[str, Any]:
        """What varies, by dotted path, as this trial has it; and its label and seed."""
        return self._varying.values(trial)

    def missing(self) -> list[str]:
        """Ids of the runs of which something is not written, by the names of the files that there
        are; none where those cannot be listed."""
        there: dict[str, set[str]] = {}
        try:
            for path in storage.stamps(self._folder):
                folder, _, name = path.partition("/")
                if name.startswith(PREFIX):
                    there.setdefault(folder.rpartition("-")[2], set()).add(name.rpartition(".")[2])
        except OSError as error:
            self._warn(_short(error))
            return []
        found = []
        for run_id, known in list(self._agenda.known.items()):
            due = {_kind(step) for step in list(known.scores)}
            due |= set() if known.state in GOES_ON else {END}
            if not due <= there.get(run_id, set()):
                found.append(run_id)
        return found

    def catch_up(self) -> None:
        """Write what earlier sessions have not, beside what trials that run now bring. Call before
        any starts."""
        for run_id in self.missing():
            self._later(lambda run_id=run_id: self._catch_up(run_id), MISSED)

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """Wait until all is written, but not for ever."""
        if self._thread is None:
            return
        self._jobs.put((LAST, 0, None))
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"not all is written after {seconds:.0f} s")
        self._thread = None

    def _later(self, job: Callable[[], None], when: int = LIVE) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="bgray-events", daemon=True)
            self._thread.start()
        self._jobs.put((when, next(self._number), job))

    def _work(self) -> None:
        while (job := self._jobs.get()[-1]) is not None:
            try:
                job()
            except Exception as error:  # a picture is not worth a sweep
                self._warn(_short(error))

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(f"TensorBoard's files are not complete ({why}); what is missing is written "
                      "when the same command runs again")  # fmt: skip

    # --- one file each

    def _start(self, trial: "Trial") -> None:
        """What varies, before the first score; and nothing stays that the run does not know."""
        variants = self._varying.variants()
        if len(variants) > self._listed:
            listing = self._columns(variants)
            storage.write_bytes(storage.join(self._folder, f"{PREFIX}0.sweep"), listing)
            self._listed = len(variants)
        folder, run = self._place(trial), _Run(trial.url)
        self._runs[trial.id] = run
        known = {_kind(step): step for step in run.read().scores}
        there: dict[int, str] = {}
        for name in storage.listdir(folder):
            if name.startswith(PREFIX):
                if (step := known.get(name.rpartition(".")[2])) is not None:
                    there[step] = name
                else:
                    storage.remove(storage.join(folder, name))
        self._there[trial.id] = there
        now = time.time()
        self._write(
            trial, "0-start", [files.event(now, 0, [files.session_start(self.values(trial), now)])]
        )

    def _report(self, trial: "Trial", step: int, replayed: bool) -> None:
        there = self._there.setdefault(trial.id, {})
        if step in there and replayed:
            return
        run = self._run(trial).read()
        before = max((s for s in run.scores if s < step), default=None)
        events = list(run.lines(before or 0, step))
        now = run.when(step)
        events += [
            files.event(now, step, [files.scalar(f"val/{name}", value)])
            for name, value in run.scores.get(step, {}).items()
            if value is not None
        ]
        for name, tag, at in _clips(trial.url, step, first=before is None):
            events.append(files.event(now, at, _heard_and_seen(trial.url, name, tag)))
        there[step] = self._write(trial, _kind(step), events, there.get(step))

    def _end(self, trial: "Trial", failed: bool) -> None:
        """How it ended; not of one that another session goes on with."""
        run = self._run(trial).read()
        del self._runs[trial.id]
        info = read_info(trial.url) or {}
        state = info.get("state", "failed" if failed else "stopped")
        if state == "running":  # its process cannot say so any more
            state = "failed" if failed else "stopped"
        if state == "interrupted":
            return
        last = max(self._there.get(trial.id, {}), default=0)
        step = info.get("step") or last
        events = list(run.lines(last, None))
        text = f"{state} at step {step}"
        text += f": {info['reason']}" if info.get("reason") else ""
        good = state in ("finished", "stopped")
        events.append(
            files.event(
                run.now, step, [files.text("state", text), files.session_end(good, run.now)]
            )
        )
        self._write(trial, END, events)

    def _catch_up(self, run_id: str) -> None:
        if run_id in self._there:  # it has started meanwhile, and brings all by itself
            return
        trial = self._agenda.trials[run_id]
        self._start(trial)
        for step in self._run(trial).read().scores:
            self._report(trial, step, replayed=True)
        if (read_info(trial.url) or {}).get("state") in (None, *GOES_ON):
            del self._runs[run_id]
        else:
            self._end(trial, failed=False)

    def _run(self, trial: "Trial") -> "_Run":
        return self._runs.setdefault(trial.id, _Run(trial.url))

    def _write(self, trial: "Trial", kind: str, events: list[Any], name: str | None = None) -> str:
        """In place of the file called `name`, if there is one; returns its name."""
        name = name or f"{PREFIX}{int(time.time())}.{kind}"
        storage.write_bytes(storage.join(self._place(trial), name), files.file_of(events))
        return name

    def _place(self, trial: "Trial") -> str:
        """Its folder; one that was given another label since stays the run that it was."""
        if self._places is None:
            names = storage.listdir(self._folder)
            self._places = {name.rpartition("-")[2]: name for name in names}
        return storage.join(self._folder, self._places.setdefault(trial.id, dirname(trial)))

    def _columns(self, variants: "list[Trial]") -> bytes:
        """The table of hyper-parameters: its columns, for all trials at once."""
        scores = list(build_task(variants[0].experiment).scores)
        scores.sort(key=lambda name: name != self._agenda.sweep.metric)
        tags = [*(f"val/{name}" for name in scores), *COLUMNS]
        kinds: dict[str, set[str]] = {}
        for trial in variants:
            for name, value in self.values(trial).items():
                kinds.setdefault(name, set()).add(files.kind_of(value))
        kind = {name: "text" if len(found) > 1 else found.pop() for name, found in kinds.items()}
        return files.file_of([files.event(0.0, 0, [files.columns(kind, tags)])])


def callback(events: Events) -> Any:
    """Tells `events` what Tune tells its loggers. A TBXLoggerCallback, so that Tune does not add
    its own, whose steps count reports and whose hyper-parameters are our ids."""
    from ray.tune import Callback
    from ray.tune.logger import TBXLoggerCallback

    class Told(TBXLoggerCallback):
        def log_trial_start(self, trial: Any) -> None:
            trial.init_local_path()  # where Tune's other loggers write
            events.start(trial.config["trial"])

        def log_trial_result(self, iteration: int, trial: Any, result: dict) -> None:
            if "step" in result:
                again = bool(result.get("replayed"))
                events.report(trial.config["trial"], result["step"], replayed=again)

        def log_trial_end(self, trial: Any, failed: bool = False) -> None:
            events.end(trial.config["trial"], failed=failed)

        def __reduce__(self) -> Any:  # Tune keeps copies on disk, which nobody reads
            return Callback, ()

    return Told()


# --- what a run's folder has


class _Run:
    """The numbers of a run's folder, as far as they were there when it was last read."""

    def __init__(self, url: str):
        self._metrics = Growing(storage.join(url, METRICS))
        self._timing = Growing(storage.join(url, TIMING))

    def read(self) -> "_Run":
        self._lines = self._metrics.lines()
        self.scores = {line["step"]: line["val"] for line in self._lines if "val" in line}
        self._facts = {line["step"]: line for line in self._timing.lines()}
        # One that is written later than it ran has its own time.
        self.now = self._metrics.changed or time.time()
        self._last = max((self._trained(step) for step in self._facts), default=0.0)
        return self

    def _trained(self, step: int) -> float:
        return self._facts.get(step, {}).get("train_seconds") or 0.0

    def when(self, step: int) -> float:
        """Of the last line, less the time trained since that step; or lines that are written
        together would all be of one moment."""
        known = step
        if step not in self._facts:
            known = max((s for s in self._facts if s <= step), default=None)
        return self.now - (self._last - self._trained(known) if known is not None else 0.0)

    def lines(self, after: int, until: int | None) -> Iterator[Any]:
        """What was logged of the training at steps above `after`, up to `until`."""
        for line in self._lines:
            step = line["step"]
            if "val" not in line and after < step and (until is None or step <= until):
                facts = {tag: self._facts.get(step, {}).get(name) for name, tag in FACTS.items()}
                values = {**{_tag(name): line[name] for name in line if name != "step"}, **facts}
                numbers = [(tag, v) for tag, v in values.items() if isinstance(v, int | float)]
                yield files.event(
                    self.when(step), step, [files.scalar(tag, value) for tag, value in numbers]
                )


def _tag(name: str) -> str:
    if name == "loss":
        return "loss/total"
    return f"loss/{name[5:]}" if name.startswith("loss_") else f"train/{name}"


def _clips(url: str, step: int, *, first: bool) -> Iterator[tuple[str, str, int]]:
    """(name without suffix, tag, step) of the sound of an evaluation; of the first one also input
    and target, which are the same at all of them."""
    wanted = {f"step-{step:06d}": ("output", step)}
    wanted |= {"input": ("input", 0), "target": ("target", 0)} if first else {}
    for name in storage.listdir(storage.join(url, "clips")):
        item, _, rest = name.removesuffix(".wav").partition("-")
        for what, (tag, at) in wanted.items():
            source = rest.removeprefix(what)
            if name.endswith(".wav") and rest.startswith(what) and source[:1] in ("", "-"):
                yield name.removesuffix(".wav"), f"{item}/{tag}{source}", at


def _heard_and_seen(url: str, name: str, tag: str) -> list[Any]:
    """A clip as it is, and its spectrogram; of a piano roll, the picture that is there."""
    clip = storage.join(url, "clips", name)
    data = storage.read_bytes(f"{clip}.wav")
    audio, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)  # (T, C)
    try:
        seen = storage.read_bytes(f"{clip}.png")
    except FileNotFoundError:
        seen = spectrogram(audio.T, rate)
    return [
        files.sound(f"clip {tag}", data),
        files.picture(f"spectrogram {tag}", seen),
    ]


def spectrogram(audio: np.ndarray, sample_rate: int) -> bytes:
    """(C, T) float, full scale 1 -> a PNG, time to the right, 0 Hz below, linear up to half the
    rate; the colours always span -100 to 0 dB, where 0 is a sine at full scale."""
    window = 1024 if sample_rate > 16_000 else 512
    mono = np.zeros(max(window, audio.shape[-1]), np.float32)
    shape = np.hanning(window).astype(np.float32)
    power: Any = 0.0
    for channel in audio:
        mono[: len(channel)] = channel
        frames = np.lib.stride_tricks.sliding_window_view(mono, window)[:: window // 2]
        power = power + np.abs(np.fft.rfft(frames * shape)) ** 2 / len(audio)  # (N, F)
    each = -(-len(power) // WIDTH)  # frames a column, of which the loudest is drawn
    starts = np.arange(0, len(power), each)
    level = np.sqrt(np.maximum.reduceat(power, starts)) / (shape.sum() / 2)
    decibel = 20 * np.log10(np.maximum(level, 10 ** (FLOOR_DB / 20)))
    shade = np.clip(255 * (1 - decibel / FLOOR_DB), 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(shade.T[::-1]), "L")
    image.putpalette(matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3].tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
