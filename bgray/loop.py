"""The training loop: steps, precision, clipping, validation, report. It knows torch; no Ray, no
files."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bgray.losses import LossSum
from bgray.optim import set_lr
from bgray.probes import Clock
from bgray.step import Step
from bgray.transfer import FULL_SCALE, received

NEVER = 2**62  # the step of a loss that is not finite, while there was none


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite: at which step, and what was logged there."""

    def __init__(self, step: int, seed: int, values: list[dict[str, float]] | None = None):
        self.step, self.seed = step, seed
        self.values = values or []
        """Of each rank that met it: loss, its parts, gradient norm, learning rate."""
        bad = [n for v in self.values for n, x in v.items() if not math.isfinite(x)]
        parts = [name for name in bad if name.startswith("loss_")] or bad[:1]
        what = ", ".join(dict.fromkeys(parts)) or "loss or gradient"
        super().__init__(
            f"{what} not finite at step {step} (batch {step - 1} of seed {seed}); "
            "lower optim.lr, clip harder with train.grad_clip, or look at that batch with --local"
        )

    def __reduce__(self):
        return NotFinite, (self.step, self.seed, self.values)


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
    """Of what is logged, since the last log line: parts of one tensor."""
    count: int = 0

    def add(self, names: tuple[str, ...], values: Tensor) -> None:
        """values: (len(names)) of one step."""
        if self.sums:
            values = values + torch.stack([self.sums[name] for name in names])
        self.sums = dict(zip(names, values.unbind(), strict=True))
        self.count += 1


def fit(
    model: nn.Module,
    loss: LossSum,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
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
    compile: bool = False,
    graph: bool = False,
    grad_clip: float | None = None,
    seed: int = 0,
    rank: int = 0,
    clock: Clock | None = None,
    stop: Callable[[], object] = lambda: False,
    full_scale: float = FULL_SCALE,
    improved: Callable[[dict[str, float]], bool] = lambda scores: False,
    average: Callable[[Tensor], Tensor] = lambda values: values,
    earliest: Callable[[Tensor], Tensor] | None = None,
    together: Callable[[Any], list[Any]] = lambda value: [value],
    said: Callable[[str, str], None] = lambda what, why: None,
) -> State:
    """Train `model` from state.step to `steps`, in place.

    model: inputs (B, C, T) -> estimate (B, S, C, T), or (estimate, extras).
    loss: (estimate, target, extras) -> (total, {part: 0-d tensor}), and `advance`, called after
      each step (bgray.losses.LossSum).
    batches: yields Batch, or Sent (bgray.transfer), for step, step+1, ...; a gap is an error. With
      a true attribute `asked` it ended because `stop` was, while it waited.
    report(kind, step, values): "train" each `every.log` steps (means since the last line),
      "validation" after evaluate(model, step), "done" with nothing once the step is checkpointed.
      Whatever it raises ends the loop.
    bf16, compile, graph, grad_clip, said: how a step is computed, see bgray.step.Step.
    stop: asked after every step; once it is true the state is saved and returned early.
    improved: whether an evaluation's scores are the best so far, so that its state is saved too.
    average, earliest, together: mean and minimum of a small tensor, and the list of anything, over
      the DDP ranks.
    Raises NotFinite, naming the exact step: at once on the CPU; on a GPU, or among ranks, which ask
    only then, at the next log step. Nothing of the steps between is logged or saved.
    """
    state = state or State()
    clock = clock or Clock(device)
    at_once = device.type == "cpu" and earliest is None
    watch = _Watch(device, seed, earliest or (lambda step: step), together)
    compute = Step(
        model,
        loss,
        device=device,
        bf16=bf16,
        grad_clip=grad_clip,
        compile=compile,
        graph=graph,
        said=said,
    )
    saved = state.step  # that state is on disk: writing it again would only risk it
    model.train()
    clock.start()
    iterator = iter(batches)
    while state.step < steps:
        with clock.waiting():
            batch = next(iterator, None)
        if batch is None and getattr(batches, "asked", False) and stop():
            watch.stop_if_bad()
            if save is not None and saved < state.step:
                with clock.apart():
                    save(state)
            break
        if batch is None or batch.step != state.step:
            came = "the stream ended" if batch is None else f"step {batch.step} came"
            raise RuntimeError(f"the batch of step {state.step} was due, but {came}")
        # Dropout and the like draw from (seed, step, rank), so a resumed run draws what the
        # unbroken one did.
        torch.manual_seed(((seed * 1_000_003 + state.step) * 65_537 + rank) % 2**63)
        inputs, targets = received(batch, device, full_scale)
        scale = schedule(state.step, steps)
        set_lr(optimizer, scale)
        logged = compute(inputs, targets)
        optimizer.step()
        state.step += 1
        loss.advance(state.step, average)

        now = torch.stack([value.float() for value in logged.values()])
        watch.look(state.step, tuple(logged), now, optimizer)
        state.add(tuple(logged), now)
        clock.step()

        last = state.step == steps
        evaluating = evaluate is not None and (state.step % every.evaluate == 0 or last)
        saving = save is not None and (state.step % every.checkpoint == 0 or last)
        if at_once or state.step % every.log == 0 or evaluating or saving:
            watch.stop_if_bad()
        if state.step % every.log == 0 or last:
            clock.read()
            report("train", state.step, {**_means(state, average), "lr_scale": scale})
        if evaluate is not None and evaluating:
            with clock.apart():
                scores = evaluate(model, state.step)
                report("validation", state.step, scores)
                model.train()
            saving |= save is not None and improved(scores)
        if save is not None and saving:
            with clock.apart():
                save(state)
            saved = state.step
        if evaluating or last:
            report("done", state.step, {})
        if not last and stop():
            watch.stop_if_bad()  # no checkpoint of weights that are not numbers
            if save is not None and not saving:
                with clock.apart():
                    save(state)
            break
    return state


def _means(state: State, average: Callable[[Tensor], Tensor]) -> dict[str, float]:
    names = list(state.sums)
    values = average(torch.stack([state.sums[name].double() for name in names]) / state.count)
    state.sums, state.count = {}, 0
    return dict(zip(names, values.tolist(), strict=True))


class _Watch:
    """Remembers the first step whose loss or gradient is not finite, with what was logged there.

    On the device: asking it at every step would make every step wait for the GPU.
    """

    def __init__(
        self,
        device: torch.device,
        seed: int,
        earliest: Callable[[Tensor], Tensor],
        together: Callable[[Any], list[Any]],
    ):
        self._step = torch.full((), NEVER, dtype=torch.long, device=device)
        self._values = torch.zeros((), device=device)
        self._names: tuple[str, ...] = ()
        self._rates: list[float] = []
        self._seed, self._earliest, self._together = seed, earliest, together

    def look(self, step: int, names: tuple[str, ...], now: Tensor, optimizer: Any) -> None:
        """now: (len(names)) of this step."""
        watched = now[names.index("loss")]
        if "grad_norm" in names:
            watched = watched + now[names.index("grad_norm")]
        finite = torch.isfinite(watched)
        first = ~finite & (self._step == NEVER)
        self._values = torch.where(first, now, self._values)
        self._step = torch.where(first, step, self._step)
        self._names = names
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def stop_if_bad(self) -> None:
        step = int(self._earliest(self._step).item())  # the same on all ranks: they stop together
        if step == NEVER:
            return
        mine = None
        if int(self._step.item()) == step:
            mine = dict(zip(self._names, self._values.tolist(), strict=True))
            # The rate moves so slowly that the last step's will do.
            mine |= {f"lr_{i}": rate for i, rate in enumerate(self._rates)}
        met = self._together(mine)
        raise NotFinite(step, self._seed, [values for values in met if values is not None])
