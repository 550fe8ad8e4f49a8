"""Save and load a run's state, the latest and the best: written whole before a pointer names it,
loaded without running any code."""

import contextlib
import errno
import hashlib
import io
import re
import time
from typing import Any

import torch

from bgray import storage
from bgray.config import ConfigError

FOLDER, LATEST, BEST = "checkpoint", "latest", "best"
POINTERS = (LATEST, BEST)
# The file's name, its bytes and their sha256, of the best also its score; an old pointer is the
# name only.
NAME = r"step-\d{8,}(?:-[0-9a-f]{8})?\.pt"
POINTER_TEXT = re.compile(rf"({NAME})(?: (\d+) ([0-9a-f]{{64}}))?(?: (\w+=\S+))?")
READ_AGAIN_SECONDS = (0.5, 2.0)
"""Pauses before a state whose bytes are not those that were written is read again."""


def save(run_url: str, step: int, state: dict[str, Any], best: str = "") -> None:
    """Write `state` (tensors, numbers, text, nested) as step-<step>.pt, then the pointers, then
    delete what none of them names: two states stay at most.

    best: `<score>=<value>` where no evaluation so far was better; for people.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    name = f"step-{step:08d}.pt"
    folder = storage.join(run_url, FOLDER)
    _write_whole(storage.join(folder, name), data)
    pointer = f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}"
    storage.write_bytes(storage.join(folder, LATEST), pointer.encode())
    if best:
        storage.write_bytes(storage.join(folder, BEST), f"{pointer} {best}".encode())
    keep = {name, _best_file(folder)}
    for other in storage.listdir(folder):
        # Newer ones stay: they are another process's, which took this run over meanwhile.
        if other.startswith("step-") and other < name and other not in keep:
            with contextlib.suppress(OSError):  # a leftover costs space, not the run
                storage.remove(storage.join(folder, other))


def best_step(run_url: str) -> int | None:
    """Steps of the state that `best` points to, or None where there is none (any more)."""
    folder = storage.join(run_url, FOLDER)
    name = _best_file(folder)
    return _step_of(name) if name and name in storage.listdir(folder) else None


def adopt(run_url: str, source_url: str, step: int) -> None:
    """Let `latest` be a copy of another run's, which is at `step`. Doing it twice is doing it once.

    The copy's name tells its content: what `best` names, this run's own state of that step maybe,
    stays as it is. ConfigError where the other run is not there.
    """
    source, folder = (storage.join(url, FOLDER) for url in (source_url, run_url))
    pointer = _read_pointer(source, LATEST)
    if pointer is None or _step_of(pointer[0]) != step:
        there = f"is at {pointer[0]}" if pointer else "has no checkpoint"
        raise ConfigError(source_url, [("", f"{there}, but was to be copied at step {step}")])
    path = storage.join(source, pointer[0])
    try:
        data = _read_whole(path, *pointer[1:])
    except (_Changed, FileNotFoundError) as error:
        text = f"cannot be copied ({_what(error)}); {_way_out(source, LATEST)}"
        raise ConfigError(path, [("", text)]) from error
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"step-{step:08d}-{sha256[:8]}.pt"
    _write_whole(storage.join(folder, name), data)
    text = f"{name} {len(data)} {sha256}"
    storage.write_bytes(storage.join(folder, LATEST), text.encode())


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-").removesuffix(".pt").split("-")[0])


def settle_best(run_url: str, evaluated: tuple[int, float] | None, score: str, step: int) -> None:
    """Before going on from the latest state, after `step` steps: let `best` say what it would if
    nothing had been killed.

    evaluated: step and value of the best evaluation up to there, None where there was none. Where
      the state of the best one is gone, of those from the state that is left on.
    """
    folder = storage.join(run_url, FOLDER)
    there = best_step(run_url)
    if there is None or there > step:  # or damaged
        storage.remove(storage.join(folder, BEST))
    if evaluated is None or evaluated[0] != step or there == step:
        return
    # Killed between the two pointers, or the best one that is left.
    latest = storage.read_bytes(storage.join(folder, LATEST)).decode().strip()
    text = f"{latest} {score}={evaluated[1]!r}"
    storage.write_bytes(storage.join(folder, BEST), text.encode())


def _best_file(folder: str) -> str | None:
    """The name in `best`; None also where it is damaged: the next best one mends it."""
    try:
        pointer = _read_pointer(folder, BEST)
    except ConfigError:
        return None
    return pointer[0] if pointer else None


def _write_whole(path: str, data: bytes) -> None:
    """On remote storage ask for the size that arrived: the older state is deleted right after."""
    there = None
    for _ in range(2):
        storage.write_bytes(path, data)
        if not storage.is_remote(path) or (there := storage.size(path)) == len(data):
            return
    raise OSError(errno.EIO, f"{there} bytes arrived of {len(data)}, twice", path)


def load(
    run_url: str, device: "torch.device | str" = "cpu", which: str = LATEST
) -> dict[str, Any] | None:
    """The state that `latest` (or `best`) points to, or None where no checkpoint was finished.

    Loaded with weights_only: a checkpoint from someone else's bucket cannot run code.
    """
    folder = storage.join(run_url, FOLDER)
    pauses = iter(READ_AGAIN_SECONDS)
    pointer = _read_pointer(folder, which)
    while pointer is not None:
        path = storage.join(folder, pointer[0])
        try:
            data = _read_whole(path, *pointer[1:])
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # storage that does not answer now is no reason to delete what is there
            pause = next(pauses, None)
            if pause is None or not isinstance(error, FileNotFoundError | _Changed):
                text = f"cannot be read ({_what(error)}); {_way_out(folder, which)}"
                raise ConfigError(path, [("", text)]) from error
            time.sleep(pause)
        # Meanwhile the run that is being read may have gone on, and deleted what we looked for.
        pointer = _read_pointer(folder, which)
    return None


class _Changed(Exception):
    """What was read is not what was written."""


def _what(error: Exception) -> str:
    return str(error) if isinstance(error, _Changed) else f"{type(error).__name__}: {error}"


def _way_out(folder: str, which: str) -> str:
    if which == BEST:
        return f"delete {storage.join(folder, BEST)}; the latest state is another file"
    return f"delete the folder {folder} to start from step 0"


def _read_pointer(folder: str, which: str) -> tuple[str, int | None, str | None] | None:
    """(name, bytes, sha256), the latter two None in an old pointer; None where there is no
    pointer."""
    path = storage.join(folder, which)
    try:
        text = storage.read_bytes(path).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    if (found := POINTER_TEXT.fullmatch(text)) is None:
        raise ConfigError(
            path, [("", f"names no checkpoint: {text[:80]!r}; {_way_out(folder, which)}")]
        )
    name, num_bytes, sha256, _ = found.groups()
    return name, None if num_bytes is None else int(num_bytes), sha256


def _read_whole(path: str, num_bytes: int | None, sha256: str | None) -> bytes:
    data = storage.read_bytes(path)
    if num_bytes is not None and len(data) != num_bytes:
        raise _Changed(f"{len(data)} bytes there, {num_bytes} written")
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise _Changed(f"sha256 {found[:12]} there, {sha256[:12]} written")
    return data
