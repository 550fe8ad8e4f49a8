"""The training loop: steps, precision, clipping, validation, report. It knows torch; no Ray, no
files."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bgray.data import Batch
from bgray.losses import LossSum
from bgray.optim import set_lr
from bgray.probes import Clock

FULL_SCALE = 32768.0
NEVER = 2**62  # the step of a loss that is not finite, while there was none


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; says at which step."""

    def __init__(self, step: int, seed: int):
        super().__init__(
            f"loss or gradient not finite at step {step} (batch {step - 1} of seed {seed}); "
            "lower optim.lr, clip harder with train.grad_clip, or look at that batch with --local"
        )
        self.step, self.seed = step, seed

    def __reduce__(self):
        return NotFinite, (self.step, self.seed)


@dataclass(frozen=True)
class Every:
    """Steps between the loop's side jobs; each also happens after the last step."""

    log: int = 10
    evaluate: int = 1000
    checkpoint: int = 1000


@dataclass
class State:
    """Where the loop is; with model and optimizer, all that a restart needs: the data position is
    `step`."""

    step: int = 0
    """Steps done."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of what is logged, since the last log line."""
    count: int = 0


def fit(
    model: nn.Module,
    loss: LossSum,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    steps: int,
    report: Callable[[str, int, dict[str, Any]], None],
    state: State | None = None,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    save: Callable[[State], None] | None = None,
    every: Every = Every(),  # noqa: B008 (frozen)
    schedule: Callable[[int, int], float] = lambda step, steps: 1.0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    bf16: bool = False,
    grad_clip: float | None = None,
    seed: int = 0,
    rank: int = 0,
    clock: Clock | None = None,
    stop: Callable[[], bool] = lambda: False,
    full_scale: float = FULL_SCALE,
    average: Callable[[Tensor], Tensor] = lambda values: values,
    earliest: Callable[[Tensor], Tensor] = lambda step: step,
) -> State:
    """Train `model` from state.step to `steps`, in place.

    model: inputs (B, C, T) -> estimate (B, S, C, T), or (estimate, extras).
    loss: (estimate, target, extras) -> (total, {part: 0-d tensor}), and `advance`, called after
      each step (bgray.losses.LossSum).
    batches: yields Batch for step, step+1, ...; a gap is an error.
    report(kind, step, values): "train" each `every.log` steps (means since the last line),
    "validation" after
      evaluate(model, step), "done" with nothing once the step is checkpointed. Whatever it raises
      ends the loop.
    stop: asked after every step; once it is true the state is saved and returned early.
    average, earliest: mean and minimum of a small tensor over the DDP ranks.
    Raises NotFinite at the first log step after a loss that is not finite, naming the exact step.
    """
    state = state or State()
    clock = clock or Clock(device)
    bad = torch.full((), NEVER, dtype=torch.long, device=device)
    model.train()
    clock.start()
    iterator = iter(batches)
    while state.step < steps:
        with clock.waiting():
            batch = next(iterator, None)
        if batch is None or batch.step != state.step:
            came = "the stream ended" if batch is None else f"step {batch.step} came"
            raise RuntimeError(f"the batch of step {state.step} was due, but {came}")
        # Dropout and the like draw from (seed, step, rank), so a resumed run draws what the
        # unbroken one did.
        torch.manual_seed(((seed * 1_000_003 + state.step) * 65_537 + rank) % 2**63)
        inputs = to_device(batch.inputs, device, full_scale)
        targets = to_device(batch.targets, device, full_scale)
        scale = schedule(state.step, steps)
        set_lr(optimizer, scale)

        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            estimate, extras = split_extras(model(inputs))  # (B, S, C, T)
        total, parts = loss(estimate.float(), targets, extras)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        logged = {"loss": total.detach(), **{f"loss_{name}": part for name, part in parts.items()}}
        if grad_clip is not None:
            logged["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), grad_clip).detach()
        optimizer.step()
        state.step += 1
        loss.advance(state.step, average)

        # Remembered on the device: asking here whether it is finite would make every step wait for
        # the GPU.
        finite = torch.isfinite(logged["loss"]) & torch.isfinite(
            logged.get("grad_norm", logged["loss"])
        )
        bad = torch.where(~finite, torch.clamp(bad, max=state.step), bad)
        for name, value in logged.items():
            state.sums[name] = state.sums[name] + value if name in state.sums else value
        state.count += 1
        clock.step()

        last = state.step == steps
        evaluating = evaluate is not None and (state.step % every.evaluate == 0 or last)
        saving = save is not None and (state.step % every.checkpoint == 0 or last)
        if state.step % every.log == 0 or evaluating or saving:
            _stop_if(bad, seed, earliest)
        if state.step % every.log == 0 or last:
            clock.read()
            report("train", state.step, {**_means(state, average), "lr_scale": scale})
        if evaluate is not None and evaluating:
            with clock.apart():
                report("validation", state.step, evaluate(model, state.step))
                model.train()
        if save is not None and saving:
            with clock.apart():
                save(state)
        if evaluating or last:
            report("done", state.step, {})
        if not last and stop():
            _stop_if(bad, seed, earliest)  # no checkpoint of weights that are not numbers
            if save is not None and not saving:
                with clock.apart():
                    save(state)
            break
    return state


def split_extras(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(estimate, extras) of what a model returned: some return the estimate alone."""
    return output if isinstance(output, tuple) else (output, {})


def to_device(samples: Any, device: torch.device, full_scale: float = FULL_SCALE) -> Tensor:
    """int16 samples to float32, 1.0 being `full_scale`, on the device; int16 is what crosses the
    bus.

    Copied first: batches may be shared memory that other readers see, and must never be written to.
    """
    tensor = torch.empty(samples.shape, dtype=torch.int16, pin_memory=device.type == "cuda")
    tensor.numpy()[...] = samples
    return tensor.to(device, non_blocking=True).to(torch.float32) / full_scale


def _means(state: State, average: Callable[[Tensor], Tensor]) -> dict[str, float]:
    names = list(state.sums)
    values = average(torch.stack([state.sums[name].double() for name in names]) / state.count)
    state.sums, state.count = {}, 0
    return dict(zip(names, values.tolist(), strict=True))


def _stop_if(bad: Tensor, seed: int, earliest: Callable[[Tensor], Tensor]) -> None:
    step = int(earliest(bad).item())  # the same on all ranks, so that they stop together
    if step < NEVER:
        raise NotFinite(step, seed)
