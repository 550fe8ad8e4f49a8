"""Save and load a run's state: written whole before `latest` points to it, loaded without running
any code."""

import contextlib
import io
from typing import Any

import torch

from bgray import storage
from bgray.config import ConfigError

FOLDER, POINTER = "checkpoint", "latest"


def save(run_url: str, step: int, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, nested) as step-<step>.pt, then the pointer, then
    delete older ones."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = f"step-{step:08d}.pt"
    folder = storage.join(run_url, FOLDER)
    storage.write_bytes(storage.join(folder, name), buffer.getvalue())
    storage.write_bytes(storage.join(folder, POINTER), name.encode())
    for other in storage.listdir(folder):
        if other.startswith("step-") and other != name:
            with contextlib.suppress(OSError):  # a leftover costs space, not the run
                storage.remove(storage.join(folder, other))


def load(run_url: str, device: "torch.device | str" = "cpu") -> dict[str, Any] | None:
    """The state that `latest` points to, or None where no checkpoint was finished.

    Loaded with weights_only: a checkpoint from someone else's bucket cannot run code.
    """
    folder = storage.join(run_url, FOLDER)
    try:
        name = storage.read_bytes(storage.join(folder, POINTER)).decode().strip()
    except FileNotFoundError:
        return None
    path = storage.join(folder, name)
    try:
        data = storage.read_bytes(path)
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # storage that does not answer now is no reason to delete what is there
        raise ConfigError(
            path,
            [
                (
                    "",
                    f"cannot be read ({type(error).__name__}: {error}); delete the folder "
                    f"{folder} to start from step 0",
                )
            ],
        ) from error
