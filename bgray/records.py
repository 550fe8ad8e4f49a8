"""A run's folder: what it is, its metrics by step, its state. The same on a local path and on
S3."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from bgray import storage
from bgray.config import ConfigError, Experiment

State = Literal[
    "running", "finished", "stopped", "diverged", "out_of_memory", "interrupted", "failed"
]
ENDED = ("finished", "stopped", "diverged")
"""States that running the sweep again leaves alone: `stopped` is pruned by ASHA, `diverged` met a
loss that is not finite. The others (a crash, Ctrl-C, a full disk, too little GPU memory) go on from
their last checkpoint."""

PRUNED = "pruned by ASHA"
DIFF_LIMIT = 20_000  # characters of uncommitted changes that a record keeps

METRICS, TIMING, ITEMS = "metrics.jsonl", "timing.jsonl", "validation_items.jsonl"
PACKAGES = (
    "torch",
    "torchaudio",
    "ray",
    "numpy",
    "pyarrow",
    "auraloss",
    "heavyball",
    "soundfile",
    "soxr",
)


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
        except yaml.YAMLError as error:
            raise _damaged(path, error) from None
        ignored = ("runtime", "name")
        found = sorted(_differences(_drop(old, ignored), _drop(new, ignored)))
        found = [line for line in found if not line.startswith("data.path")]
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
        """Merge facts into run.json, atomically."""
        self.info.update(facts)
        storage.write_bytes(
            storage.join(self.url, "run.json"), json.dumps(self.info, indent=1).encode() + b"\n"
        )

    def begin(self, from_step: int, **facts: Any) -> None:
        """This process starts (or goes on) at `step`: later lines of an earlier try are cut off."""
        refuse_while_alive(self.url)
        for name in (METRICS, TIMING, ITEMS):
            self._cut(name, from_step)
        storage.remove(storage.join(self.url, "error.txt"))
        attempts = [
            *self.info.get("attempts", []),
            {"from_step": from_step, "started": _now(), **process(), **machine()},
        ]
        self.update(id=self.id, state="running", reason=None, attempts=attempts, **facts)

    # --- lines by step ---

    def append(self, name: str, line: dict[str, Any]) -> None:
        """One line of JSON; on disk at once locally, with the next `flush` on S3."""
        text = json.dumps(line) + "\n"
        if storage.is_remote(self.url):
            self._lines[name].append(text)
            self._dirty.add(name)
        else:
            with Path(self.url, name).open("a") as file:
                file.write(text)

    def flush(self) -> None:
        """Make every appended line durable; call before a checkpoint that relies on them."""
        for name in (METRICS, TIMING, ITEMS):
            path = storage.join(self.url, name)
            if name in self._dirty:
                storage.write_bytes(path, "".join(self._lines[name]).encode())
            elif not storage.is_remote(self.url) and Path(path).exists():
                with Path(path).open("rb") as file:
                    os.fsync(file.fileno())
        self._dirty.clear()

    def _cut(self, name: str, step: int) -> None:
        path = storage.join(self.url, name)
        kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
        storage.write_bytes(path, "".join(kept).encode())
        self._lines[name] = kept


@contextlib.contextmanager
def recorded_failure(url: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """An exception in the block ends in the run's record (reason, error.txt), not in the caller.

    Tune and Train would print pages of their own frames, and a sweep goes on without the trial.
    stopped: whether the scheduler has ended the run; then the exception is only its workers' death.
    """
    try:
        yield
    except Exception as error:
        if stopped():
            close_from_outside(url, "stopped", PRUNED)
            return
        # An earlier try may have left another word of how it ended.
        close_from_outside(url, "failed", reason(error), over=("running", "interrupted", "failed"))
        storage.write_bytes(storage.join(url, "error.txt"), traceback.format_exc().encode())


def reopen(url: str) -> None:
    """Let a run that a killed process left, or that ran out of memory, wait for its turn again.

    ConfigError while another process of this machine is at it.
    """
    if read_info(url) is not None:
        refuse_while_alive(url)
        over: tuple[State, ...] = ("running", "out_of_memory")
        close_from_outside(url, "interrupted", "to be continued", over)


def close_from_outside(
    url: str, state: State, why: str, over: tuple[State, ...] = ("running",)
) -> None:
    """Say how a run ended that could not say it itself; a state that is not in `over` stands."""
    info = read_info(url) or {"id": url.rsplit("/", 1)[-1]}
    if info.get("state", "running") in over:
        info |= {"state": state, "reason": why}
        storage.write_bytes(storage.join(url, "run.json"), json.dumps(info, indent=1).encode())


def reason(error: BaseException) -> str:
    """An exception in one line; of one that came through Ray, the last line of the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]


# --- reading


def read_lines(url: str) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; a last line that a crash cut short is left out; none where there
    is no file."""
    try:
        text = storage.read_bytes(url).decode()
    except FileNotFoundError:
        return []
    return list(_complete_lines(text))


def _complete_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # torn by a crash; whatever follows it cannot be trusted either


def read_info(url: str) -> dict[str, Any] | None:
    """run.json, or None where there is none."""
    path = storage.join(url, "run.json")
    try:
        return json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> ConfigError:
    text = f"is damaged ({str(error).splitlines()[0]}); move its folder away to start afresh"
    return ConfigError(path, [("", text)])


def runs(sweep_url: str) -> list[Summary]:
    """Every run in a sweep's folder."""
    found = []
    for name in storage.listdir(sweep_url):
        url = storage.join(sweep_url, name)
        if len(name) == 12 and (info := read_info(url)) is not None:
            found.append(Summary(name, url, info.get("state", "?"), info))
    return found


# --- who holds it


def process() -> dict[str, Any]:
    """This process, such that another one with its number later is not taken for it."""
    return {"pid": os.getpid(), "pid_started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks since boot; None: there is
    none."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def alive(info: dict[str, Any] | None) -> int | None:
    """The number of another process of this machine that is at this run now, or None."""
    if not info or info.get("state") != "running" or not info.get("attempts"):
        return None
    last = info["attempts"][-1]
    pid = last.get("pid")
    if not pid or pid == os.getpid() or last.get("host") != platform.node():
        return None
    return pid if _started(pid) == last.get("pid_started") else None


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


# --- where it ran


def machine() -> dict[str, Any]:
    """Host, CPU, GPU, package versions, commit and uncommitted changes: enough to run it again."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        **git(),
    }
    import torch  # here, so that reading records needs no torch

    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def git() -> dict[str, Any]:
    """Commit, uncommitted changes and new files of the checkout that bgray runs from, as far as
    they fit; empty outside of one (an installed package within another project's repository)."""
    here = Path(__file__).resolve().parent.parent

    def run(*args: str) -> str | None:
        command = ["git", "-C", str(here), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            return None
        return done.stdout if done.returncode == 0 else None

    top, commit = run("rev-parse", "--show-toplevel"), run("rev-parse", "HEAD")
    if top is None or commit is None or Path(top.strip()).resolve() != here:
        return {}
    diff = run("diff", "HEAD") or ""
    names = (run("ls-files", "--others", "--exclude-standard") or "").splitlines()
    new = {}
    for name in names[:50]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            new[name] = (here / name).read_text()[:DIFF_LIMIT]
    return {
        "commit": commit.strip(),
        "dirty_diff": diff[:DIFF_LIMIT],
        "dirty_diff_cut": len(diff) > DIFF_LIMIT,
        "new_files": new if sum(map(len, new.values())) <= DIFF_LIMIT else names,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
