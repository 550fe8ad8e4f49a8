"""What the DDP ranks of one run agree on: where they start, when they stop, means and minima."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from bgray.config import ConfigError
from bgray.records import CTRL_C, NOTICE

REASONS = ("", CTRL_C, NOTICE)
"""To stop early, as a rank tells the others."""


def agree_on_start(step: int, url: str) -> None:
    """Ranks that see different checkpoints would train different steps, or wait for ever."""
    steps = together(step)
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


def together(value: Any) -> list[Any]:
    """What each rank has, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Rank 0's buffers everywhere: DDP does so before each training step, so that after the last
    one the ranks' running means of batch norm differ."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)


def stop_together(stop: Callable[[], str], every: int, device: torch.device) -> Callable[[], str]:
    """Ranks must leave at the same step, so they ask each other, at every `every`-th question; the
    weightiest reason of any of them is that of all."""
    asked = 0

    def ask() -> str:
        nonlocal asked
        asked += 1
        if asked % every:
            return ""
        reason = torch.tensor(REASONS.index(stop()), device=device)
        torch.distributed.all_reduce(reason, torch.distributed.ReduceOp.MAX)
        return REASONS[int(reason.item())]

    return ask
