"""Batches on their way to the device: int16 over the bus from pinned memory, ahead of the step."""

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bgray.data import Batch

FULL_SCALE = 32768.0


class Sent(NamedTuple):
    """A batch whose copy to the GPU was started."""

    step: int
    inputs: Tensor
    """(B, C, T) int16 on the GPU."""
    targets: Tensor
    """(B, S, C, T) int16 on the GPU."""
    there: torch.cuda.Event


def ahead(batches: Iterator[Batch], device: torch.device) -> Generator[Any]:
    """The batches, copied to a GPU on a stream of its own as soon as they are asked for; on the CPU
    as they are. For a thread that asks ahead of the training, whose GPU is the one in force here:
    another thread would take the first."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _copied(batches, device)


def _copied(batches: Iterator[Batch], device: torch.device) -> Generator[Any]:
    try:
        if device.type != "cuda":
            yield from batches
            return
        stream = torch.cuda.Stream(device)
        for batch in batches:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                pinned = [_pinned(samples) for samples in (batch.inputs, batch.targets)]
                inputs, targets = (p.to(device, non_blocking=True) for p in pinned)
                there = torch.cuda.Event()
                there.record(stream)
            yield Sent(batch.step, inputs, targets, there)
    finally:
        getattr(batches, "close", lambda: None)()


def received(batch: Any, device: torch.device, full_scale: float) -> tuple[Tensor, Tensor]:
    """Inputs (B, C, T) and targets (B, S, C, T) of a Batch or Sent: float32 on the device, 1.0
    being `full_scale`."""
    if not isinstance(batch, Sent):
        inputs = to_device(batch.inputs, device, full_scale)
        return inputs, to_device(batch.targets, device, full_scale)
    now = torch.cuda.current_stream(device)
    now.wait_event(batch.there)
    for samples in (batch.inputs, batch.targets):
        samples.record_stream(now)  # their memory was another stream's
    return batch.inputs.float() / full_scale, batch.targets.float() / full_scale


def to_device(samples: np.ndarray, device: torch.device, full_scale: float = FULL_SCALE) -> Tensor:
    """int16 samples to float32, 1.0 being `full_scale`, on the device; int16 is what crosses the
    bus.

    Copied first: batches may be shared memory that other readers see, and must never be written to.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.divide(samples, np.float32(full_scale), dtype=np.float32))
    return _pinned(samples).to(device, non_blocking=True).float() / full_scale


def _pinned(samples: np.ndarray) -> Tensor:
    tensor = torch.empty(samples.shape, dtype=torch.int16, pin_memory=True)
    tensor.numpy()[...] = samples
    return tensor
