"""What the DDP ranks of one run agree on: where they start, when they stop, means and minima."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from bgray.config import ConfigError


def agree_on_start(step: int, url: str) -> None:
    """Ranks that see different checkpoints would train different steps, or wait for ever."""
    steps: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ConfigError(
            url,
            [("", f"the workers find checkpoints of different steps there ({steps}): it must be "
                  "a folder that all machines share; set runtime.results to one, or to s3://")],
        )  # fmt: skip


def least(value: Tensor) -> Tensor:
    smallest = value.clone()
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return smallest


def average(values: Tensor) -> Tensor:
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def share_buffers(model: nn.Module) -> None:
    """Rank 0's buffers everywhere: DDP does so before each training step, so that after the last
    one the ranks' running means of batch norm differ."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)


def stop_together(stop: Callable[[], bool], every: int, device: torch.device) -> Callable[[], bool]:
    """Ranks must leave at the same step, so they ask each other, at every `every`-th question."""
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        if asked % every:
            return False
        return bool(average(torch.tensor(float(stop()), device=device)).item() > 0)

    return ask
