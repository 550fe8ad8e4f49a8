"""Where the time of a step goes: its parts, its floor by operations and bytes, its profile."""

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bgray import probes
from bgray.bench_trial import run
from bgray.bench_turns import Link
from bgray.config import Experiment
from bgray.experiment import Prepared

PARTS: tuple[str, ...] = (
    "data wait",
    "transfer",
    "forward",
    "loss",
    "backward",
    "optimizer",
    "rest",
)
"""transfer: from the batch's arrival to the model, int16 to float32 on the device. optimizer:
clipping and update. rest: what is logged and watched."""


class Borders:
    """`mark(part)`: all since the last mark was `part`. The device is synchronised at each."""

    def __init__(self, device: torch.device):
        self._device, self.seconds = device, dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def reset(self) -> None:
        self.mark("rest")
        self.seconds = dict.fromkeys(PARTS, 0.0)


class Bordered(nn.Module):
    """The model between two borders. `core` is what would be compiled, and has none in it."""

    def __init__(self, model: nn.Module, borders: Borders):
        super().__init__()
        self.model, self.borders = model, borders
        self.core = getattr(model, "core", model)

    def forward(self, inputs: torch.Tensor) -> Any:
        self.borders.mark("transfer")
        output = self.model(inputs)
        self.borders.mark("forward")
        return output


def with_borders(
    borders: Borders, model: nn.Module, loss: Any, optimizer: Any, batches: Any
) -> tuple[nn.Module, Any]:
    """Model and batches for `fit`, whose calls mark the parts; loss and optimizer mark theirs from
    now on."""

    def after_loss(module: Any, args: Any, output: Any) -> None:
        borders.mark("loss")
        engine: Any = torch.autograd.Variable._execution_engine

        def at_the_end(gradient: torch.Tensor) -> None:
            engine.queue_callback(lambda: borders.mark("backward"))

        output[0].register_hook(at_the_end)

    def stream() -> Iterator[Any]:
        source = iter(batches)
        while True:
            borders.mark("rest")
            batch = next(source, None)
            borders.mark("data wait")
            if batch is None:
                return
            yield batch

    update = optimizer.step

    def step(*args: Any) -> Any:
        result = update(*args)
        borders.mark("optimizer")
        return result

    loss.register_forward_hook(after_loss)
    optimizer.step = step
    return Bordered(model, borders), stream()


def split(link: Link, experiment: Experiment, prepared: Prepared, warm_up: int, steps: int) -> None:
    """Answers with the mean seconds of each part over `steps` after the `warm_up`. Without CUDA
    graphs, which are one part."""
    from bgray.context import pick_device
    from bgray.loop import fit

    borders = Borders(pick_device(experiment.runtime.device))

    def bordered(model: Any, loss: Any, optimizer: Any, batches: Any, **options: Any) -> Any:
        model, batches = with_borders(borders, model, loss, optimizer, batches)
        return fit(model, loss, optimizer, batches, **{**options, "graph": False, "stop": stop})

    def answer() -> None:
        borders.mark("rest")
        link.answer({part: seconds / steps for part, seconds in borders.seconds.items()})

    stop = _between(borders.reset, warm_up, answer, steps)
    run(experiment, prepared, bordered)


def _between(
    start: Callable[[], Any], warm_up: int, answer: Callable[[], None], steps: int
) -> Callable[[], str]:
    """For `fit`, which asks after every step whether to stop: `start()` after the `warm_up`,
    `answer()` after `steps` more, which are the last."""
    done = itertools.count(1)

    def stop() -> str:
        now = next(done)
        if now == warm_up:
            start()
        if now < warm_up + steps:
            return ""
        answer()
        return "measured"

    return stop


# --- the floor


def floor(link: Link, experiment: Experiment, prepared: Prepared) -> None:
    """Answers with `counted` of one step, eager and with the kernels that it chose."""

    def count(model: Any, loss: Any, optimizer: Any, batches: Any, **options: Any) -> Any:
        from bgray.models import depthwise
        from bgray.transfer import received

        batch = next(iter(batches))
        inputs, targets = received(batch, options["device"], options["full_scale"])
        rounded = options.get("bf16", False)
        saved = saved_bytes(model, loss, inputs, targets, bf16=rounded)
        # Operators of ours have no formulas; the library's do the same work.
        depthwise.use("library", options["device"])
        link.answer({**counted(model, loss, optimizer, inputs, targets, rounded), "saved": saved})
        return options["state"]

    run(experiment, prepared, count)


def loss_of(model: Any, loss: Any, inputs: Any, targets: Any, bf16: bool) -> torch.Tensor:
    from bgray.step import forward

    estimate, extras = forward(model, inputs, bf16=bf16)
    return loss(estimate, targets, extras)[0]


def saved_bytes(model: Any, loss: Any, inputs: Any, targets: Any, *, bf16: bool = False) -> int:
    """Bytes that one forward pass keeps for the backward pass, each once; parameters and buffers
    are not among them, for they are there anyway."""
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    constant |= {t.untyped_storage().data_ptr() for t in loss.buffers()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            # A part of a larger tensor keeps all of it.
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss_of(model, loss, inputs, targets, bf16)
    total.backward()
    return sum(kept.values())


def counted(
    model: Any, loss: Any, optimizer: Any, inputs: Any, targets: Any, bf16: bool
) -> dict[str, Any]:
    """Of one step: `matrix` operations (products and dense convolutions) by type of number,
    `vector` operations (depthwise convolutions, transforms), `parameters` and optimizer `state` in
    bytes. Element-wise operations are no part of it: the bytes bound those."""
    tally: Counter[str] = Counter()
    with flop_counter(tally):
        loss_of(model, loss, inputs, targets, bf16).backward()
        optimizer.step()
    params = [p for p in model.parameters() if p.requires_grad]
    states = [s for state in optimizer.state.values() for s in tensors_in(state)]
    vector = tally.pop("vector", 0)
    return {
        "matrix": dict(tally),
        "vector": vector,
        "parameters": sum(p.numel() * p.element_size() for p in params),
        "state": sum(s.numel() * s.element_size() for s in states),
    }


def tensors_in(state: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(dict(state) if hasattr(state, "items") else state)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def flop_counter(tally: "Counter[str]") -> Any:
    """torch's FlopCounterMode, which also adds to `tally`: "vector", and "fp32", "bf16" ... of
    matrix products. Beside its own formulas: grouped convolutions' gradients (its own count each
    group's weights as if they met all channels), and FFTs, 5 N log2 N, real ones half of that."""
    from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop, flop_registry

    aten = torch.ops.aten
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}

    def formula(do: Callable[..., int], groups_at: int | None = None) -> Any:
        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            first = next(a for a in args if isinstance(a, torch.Tensor))
            count = do(args, out_val, kwargs)
            grouped = groups_at is not None and args[groups_at] > 1
            known = names.get(first.dtype)
            tally["vector" if grouped or known is None else known] += count
            return count

        cast(Any, flops)._get_raw = True
        return flops

    def registered(packet: Any) -> Callable[..., int]:
        entry = flop_registry[packet]
        return lambda args, out, kwargs: entry(*args, out_val=out, **kwargs)

    def gradients(args: Any, out: Any, kwargs: Any) -> int:
        *rest, groups, mask = args
        masks = ([mask[0], False, False], [False, mask[1], False])
        count: Any = conv_backward_flop  # torch has wrapped it, and takes tensors
        counts = [count(*rest, groups, only, out_val=out) for only in masks]
        return counts[0] + counts[1] // groups

    def transform(times: float) -> Any:
        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            samples = out_val if args[0].is_complex() else args[0]
            length = math.prod(samples.shape[dim] for dim in args[1])
            count = round(times * samples.numel() * math.log2(length))
            tally["vector"] += count
            return count

        cast(Any, flops)._get_raw = True
        return flops

    mapping = {
        packet: formula(registered(packet))
        for packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    }
    mapping |= {aten.convolution: formula(registered(aten.convolution), 8)}
    mapping |= {aten.convolution_backward: formula(gradients, 9)}

    mapping |= {aten._fft_r2c: transform(2.5), aten._fft_c2r: transform(2.5)}
    mapping |= {aten._fft_c2c: transform(5)}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def floor_seconds(found: dict[str, Any], precision: str, peak: Any) -> dict[str, float]:
    """From `floor`'s answer to the least time of a step: `compute` and `memory` seconds, which can
    overlap. Bytes: weights read twice, written once and read for it; gradients written once and
    read twice; optimizer state read and written; saved activations written and read."""
    flops = {"fp32": float(found["vector"])}
    for kind, count in found["matrix"].items():
        at = "tf32" if kind == "fp32" and precision != "fp32" else kind
        flops[at] = flops.get(at, 0.0) + count
    moved = 7 * found["parameters"] + 2 * found["state"] + 2 * found["saved"]
    return {
        "flops": sum(flops.values()),
        "bytes": float(moved),
        "compute": peak.compute_seconds(flops),
        "memory": peak.move_seconds(moved),
    }


# --- the profile

SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
READS = ("aten::_local_scalar_dense", "aten::item")


def profile(
    link: Link,
    experiment: Experiment,
    prepared: Prepared,
    warm_up: int,
    steps: int,
    trace: str | None,
) -> None:
    """Answers with the operators that took longest over `steps` after the `warm_up`, and how often
    the host waited for the device in a step; writes a Chrome trace. Nothing is logged between."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from bgray.loop import Every, fit

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available() and experiment.runtime.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    watch = profiler(activities=activities, acc_events=True)

    def answer() -> None:
        watch.stop()
        link.answer(found(watch, steps))
        if trace:
            watch.export_chrome_trace(trace)

    stop = _between(watch.start, warm_up, answer, steps)

    def profiled(model: Any, loss: Any, optimizer: Any, batches: Any, **options: Any) -> Any:
        quiet = Every(2**40, 2**40, 2**40)
        return fit(model, loss, optimizer, batches, **{**options, "stop": stop, "every": quiet})

    run(experiment, prepared, profiled)


def found(watch: Any, steps: int) -> dict[str, Any]:
    """Top operators by own time, in milliseconds a step, and counts a step of what waits."""
    rows, counts = [], defaultdict(float)
    gpu = any(event.self_device_time_total for event in watch.key_averages())
    for event in watch.key_averages():
        mine = event.self_device_time_total if gpu else event.self_cpu_time_total
        rows.append((event.key, mine / 1000 / steps, event.count / steps))
        for name in (*SYNCS, *READS):
            if event.key.startswith(name):
                counts[name] += event.count / steps
    rows.sort(key=lambda row: -row[1])
    kernels = sum(count for name, _, count in rows if name.startswith(LAUNCHES))
    return {
        "on": "GPU" if gpu else "CPU",
        "top": [{"name": n, "ms": ms, "calls": calls} for n, ms, calls in rows[:15]],
        "ms": sum(ms for _, ms, _ in rows),
        "syncs": {name: counts[name] for name in SYNCS},
        "reads": {name: counts[name] for name in READS},
        "launches": kernels,
        "memory": probes.memory(torch.device("cuda" if gpu else "cpu")),
    }
