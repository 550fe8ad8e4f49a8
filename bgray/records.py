"""A run's folder: what it is, its metrics by step, its state. The same on a local path and on
S3."""

import contextlib
import dataclasses
import json
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from bgray import storage
from bgray.config import ConfigError, Experiment
from bgray.holder import alive as alive
from bgray.holder import process
from bgray.lines import as_text, naming
from bgray.lines import read_lines as read_lines
from bgray.problems import first_line
from bgray.provenance import changes_apart, machine, news

State = Literal[
    "running", "finished", "stopped", "diverged", "out_of_memory", "interrupted", "failed"
]
ENDED = ("finished", "stopped", "diverged")
"""States that running the sweep again leaves alone: `stopped` is pruned by ASHA, `diverged` met a
loss that is not finite. The others (a crash, Ctrl-C, a full disk, too little GPU memory) go on from
their last checkpoint."""

PRUNED = "pruned by ASHA"
CTRL_C = "Ctrl-C"
NOTICE = "its machine is about to be taken away"
"""Why a run stopped early with a checkpoint: somebody asked, or a spot machine's notice came."""
MAX_DEATHS = 3
"""So many starts of one session that got no further than each other end a run."""

METRICS, TIMING, ITEMS = "metrics.jsonl", "timing.jsonl", "validation_items.jsonl"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What run.json says of a run; read without torch or Ray."""

    id: str
    url: str
    state: str
    info: dict[str, Any]


class Run:
    """Writes one run's folder. Only one process may hold it (rank 0).

    experiment.yaml is the resolved config, run.json says what ran where and how it ended,
    metrics.jsonl has one line
    per logged step in order (no clock in it, so equal runs have equal files), timing.jsonl the
    clock, memory and
    data wait, validation_items.jsonl every item's score at every evaluation.
    """

    def __init__(self, url: str, experiment: Experiment, data_hash: str):
        self.url = url
        self.id, self.data_hash = experiment.identity(data_hash), data_hash
        self._lines: dict[str, list[str]] = {}
        self._dirty: set[str] = set()
        self._token = uuid.uuid4().hex
        self._begun = False
        self._known: tuple[int, ...] = ()
        self._refuse_another(experiment, data_hash)
        storage.write_bytes(
            storage.join(url, "experiment.yaml"),
            yaml.safe_dump(experiment.resolved(), sort_keys=False).encode(),
        )
        self.info = read_info(url) or {}

    def _refuse_another(self, experiment: Experiment, data_hash: str) -> None:
        path = storage.join(self.url, "experiment.yaml")
        if not storage.exists(path):
            return
        try:
            old, new = yaml.safe_load(storage.read_bytes(path)), experiment.resolved()
            if not isinstance(old, dict):
                raise ValueError("no config")
        except (yaml.YAMLError, ValueError) as error:
            raise _damaged(path, error) from None
        ignored = ("runtime", "name")
        found = sorted(_differences(_drop(old, ignored), _drop(new, ignored)))
        # The same data elsewhere; the same run for longer.
        found = [line for line in found if not line.startswith(("data.path", "train.steps:"))]
        recorded = (read_info(self.url) or {}).get("data_hash", data_hash)
        if recorded != data_hash:
            found.append(f"data: {recorded[:12]} there, {data_hash[:12]} now")
        if found:
            raise ConfigError(
                self.url,
                [("", f"holds a run of another config: {'; '.join(found[:5])}. Move that "
                    "folder away, or write to another "
                      "place with --set runtime.results=FOLDER")],
            )  # fmt: skip

    # --- facts and state ---

    def update(self, **facts: Any) -> None:
        """Merge facts into run.json, atomically. Superseded as in `flush`."""
        self._still_ours()
        self.info.update(facts)
        if self.info.get("attempts") and facts.get("state", "running") != "running":
            self.info["attempts"][-1]["ended"] = facts["state"]
        storage.write_bytes(
            storage.join(self.url, "run.json"), json.dumps(self.info, indent=1).encode() + b"\n"
        )

    def begin(self, from_step: int, session: str = "", **facts: Any) -> None:
        """This process starts (or goes on) at `step`: later lines of an earlier try are cut off.

        session: which command's doing this is, for `died_in_vain`.
        """
        refuse_while_alive(self.url)
        for folder in (self.url, f"{self.url}/checkpoint", f"{self.url}/clips"):
            sweep_up(folder)
        self._begun = False
        facts_of_it, changes = changes_apart(machine())
        for name, content in changes.items():
            storage.write_bytes(storage.join(self.url, name), content)
        attempts = self.info.get("attempts", [])
        attempt = {
            "from_step": from_step,
            "started": _now(),
            "session": session,
            "token": self._token,
            **process(),
            **news(facts_of_it, attempts),
        }
        attempts = [*attempts, attempt]
        # Before the lines are cut: from here on nobody else appends any. Killed in between, the
        # next start cuts them.
        self.update(id=self.id, state="running", reason=None, attempts=attempts, **facts)
        self._begun = True
        try:
            for name in (METRICS, TIMING, ITEMS):
                self._cut(name, from_step)
        except ConfigError as error:
            self.update(state="failed", reason=reason(error))
            raise
        storage.remove(storage.join(self.url, "error.txt"))

    # --- lines by step ---

    def append(self, name: str, line: dict[str, Any]) -> None:
        """One line of JSON; on disk at once locally, with the next `flush` on S3."""
        text = as_text(line)
        if storage.is_remote(self.url):
            self._lines[name].append(text)
            self._dirty.add(name)
        else:
            self._still_ours()
            with naming(f"{self.url}/{name}"), Path(self.url, name).open("a") as file:
                file.write(text)

    def flush(self) -> None:
        """Make every appended line durable; call before a checkpoint that relies on them.

        Superseded where another process has begun this run since: on a machine cut off from the
        cluster, say, which it took for dead.
        """
        self._still_ours()
        for name in (METRICS, TIMING, ITEMS):
            path = storage.join(self.url, name)
            if name in self._dirty:
                storage.write_bytes(path, "".join(self._lines[name]).encode())
            elif not storage.is_remote(self.url) and Path(path).exists():
                with naming(path), Path(path).open("rb") as file:
                    os.fsync(file.fileno())
        self._dirty.clear()

    def _still_ours(self) -> None:
        # Whoever takes the run over replaces run.json by another file. Asked before it is read: one
        # that comes in between is seen the next time.
        known = () if storage.is_remote(self.url) else _stamp(f"{self.url}/run.json")
        if known and known == self._known:
            return
        attempts = (read_info(self.url) or {}).get("attempts") if self._begun else None
        if attempts and attempts[-1].get("token", self._token) != self._token:
            other = attempts[-1]
            raise Superseded(
                f"{self.url}: process {other.get('pid')} on {other.get('host')} has taken this "
                "run over; this one stops and writes nothing more"
            )
        self._known = known if self._begun else ()

    def _cut(self, name: str, step: int) -> None:
        path = storage.join(self.url, name)
        kept = [as_text(line) for line in read_lines(path) if line["step"] <= step]
        storage.write_bytes(path, "".join(kept).encode())
        self._lines[name] = kept


def _stamp(path: str) -> tuple[int, ...]:
    """What differs between a file and one that has replaced it; empty where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


class Superseded(RuntimeError):
    """Another process trains this run now; what it writes must stand."""


def died_in_vain(info: dict[str, Any] | None, session: str, step: int) -> bool:
    """Whether the last MAX_DEATHS attempts of this session all began at `step`, and none of them
    was stopped on purpose: one more would end like them."""
    attempts = [a for a in (info or {}).get("attempts", []) if a.get("session") == session]
    last = [a for a in attempts if a.get("ended") != "interrupted"][-MAX_DEATHS:]
    return len(last) == MAX_DEATHS and all(a["from_step"] == step for a in last)


@contextlib.contextmanager
def recorded_failure(url: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """An exception in the block ends in the run's record (reason, error.txt), not in the caller.

    Tune and Train would print pages of their own frames, and a sweep goes on without the trial.
    stopped: whether the scheduler has ended the run; then the exception is only its workers' death.
    """
    try:
        yield
    except Superseded:
        return
    except Exception as error:
        if stopped():
            close_from_outside(url, "stopped", PRUNED)
            return
        # On a full disk not even this can be written; the driver finds out for itself, and another
        # start of this run would end the same way.
        with contextlib.suppress(OSError):
            # An earlier try may have left another word of how it ended.
            over: tuple[State, ...] = ("running", "interrupted", "failed")
            close_from_outside(url, "failed", reason(error), over=over)
            storage.write_bytes(storage.join(url, "error.txt"), traceback.format_exc().encode())


def sweep_up(url: str, name: str = ".+") -> None:
    """Remove what writes of a file `name` (a pattern) left in a local folder when they were killed.
    Nobody may be writing there now."""
    for path in storage.leftovers(url, name):
        storage.remove(path)


def is_done(info: dict[str, Any] | None, steps: int) -> bool:
    """Whether a run of `steps` steps has nothing left to do; one stopped at a rung has."""
    state = (info or {}).get("state")
    return state == "diverged" or (state == "finished" and (info or {}).get("step", 0) >= steps)


def reopen(url: str, *, ours: bool = False) -> None:
    """Let a run that a killed process left, that ran out of memory, was stopped at a rung or is to
    be longer than it was, wait for its turn again.

    ConfigError while another process of this machine is at it; not asked for with `ours`.
    """
    if read_info(url) is not None:
        if not ours:
            refuse_while_alive(url)
        over: tuple[State, ...] = ("running", "out_of_memory", "stopped", "finished")
        close_from_outside(url, "interrupted", "to be continued", over)


def close_from_outside(
    url: str,
    state: State,
    why: str,
    over: tuple[State, ...] = ("running",),
    **facts: Any,
) -> None:
    """Say how a run ended that could not say it itself; a state that is not in `over` stands."""
    info = read_info(url) or {"id": url.rsplit("/", 1)[-1]}
    if info.get("state", "running") in over:
        info |= {"state": state, "reason": why, **facts}
        storage.write_bytes(storage.join(url, "run.json"), json.dumps(info, indent=1).encode())


def reason(error: BaseException) -> str:
    """An exception in one line; of one that came through Ray, its first cause."""
    for cause in _causes(error):
        if isinstance(cause, ConfigError):
            said = [f"{path}: {text}" if path else text for path, text in cause.problems]
            return " ".join(f"{cause.source}: {'; '.join(said)}".split())[:500]
    cause, chained, _ = str(error).partition("The above exception was the direct cause")
    if chained and (lines := [line.strip() for line in cause.splitlines() if line.strip()]):
        return lines[-1][:500]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what led to it; Ray keeps that as `cause`."""
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


# --- reading


def evaluations(url: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, metrics) of every evaluation in a run's folder, as reported to Tune."""
    lines = read_lines(storage.join(url, METRICS))
    return [
        (line["step"], {"step": line["step"], **line["val"]}) for line in lines if "val" in line
    ]


def read_info(url: str) -> dict[str, Any] | None:
    """run.json, or None where there is none; ConfigError where it is damaged."""
    path = storage.join(url, "run.json")
    info = storage.read_json(path, AFRESH)
    for key, kind in KINDS.items():
        if info and not isinstance(info.get(key, kind()), kind):
            raise _damaged(path, ValueError(f"{key} is {str(info[key])[:40]!r}"))
    attempts = (info or {}).get("attempts", [])
    if not all(isinstance(attempt, dict) for attempt in attempts):
        raise _damaged(path, ValueError("attempts are no objects"))
    return info


KINDS = {"id": str, "state": str, "step": int, "steps": int, "data_hash": str, "metrics": dict}
KINDS |= {"timing": dict, "guards": dict, "warnings": list, "attempts": list}
"""Facts in run.json that its readers rely on."""
AFRESH = "move its folder away to start afresh"


def _damaged(path: str, error: Exception) -> ConfigError:
    return ConfigError(path, [("", f"is damaged ({first_line(error)}); {AFRESH}")])


def runs(sweep_url: str) -> list[Summary]:
    """Every run in a sweep's folder."""
    found = []
    for name in storage.listdir(sweep_url):
        url = storage.join(sweep_url, name)
        if len(name) == 12 and (info := read_info(url)) is not None:
            found.append(Summary(name, url, info.get("state", "?"), info))
    return found


# --- who holds it


def refuse_while_alive(url: str, patience_seconds: float = 20.0) -> None:
    """ConfigError while another process of this machine trains the run: two would mix their lines.

    Waits a little first: the workers of a driver that was killed notice it after seconds.
    """
    deadline = time.monotonic() + patience_seconds
    while pid := alive(read_info(url)):
        if time.monotonic() > deadline:
            text = f"process {pid} on this machine is training this run; wait for it or stop it"
            raise ConfigError(url, [("", text)])
        time.sleep(0.5)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _drop(raw: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            yield from _differences(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
    elif old != new:
        yield f"{path}: {old!r} there, {new!r} now"
