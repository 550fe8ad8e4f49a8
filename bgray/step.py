"""One training step up to the gradients: forward, loss, backward, clipping; on a GPU recorded once
and replayed."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bgray.losses import LossSum
from bgray.problems import first_line

EAGER_STEPS = 4
"""Before recording: compilation, autotuning and libraries' first allocations are over then."""

Logged = dict[str, Tensor]


class Step:
    """`step(inputs, targets)`: leaves gradients in the parameters' `.grad`, returns what is logged.

    inputs (B, C, T) and targets (B, S, C, T), float32 on the device. Returned are 0-d tensors,
    `loss`, `loss_<part>` and `grad_norm` (with grad_clip), which the next call may overwrite.

    compile: the model's real-valued core goes through torch.compile at the first call.
    graph: after EAGER_STEPS calls on a GPU the kernels of one are recorded as a CUDA graph, for the
    shapes it has then, and replayed from then on: one launch instead of thousands. Inputs of other
    shapes are computed as before.
    said(what, why): told where compilation ("compile") or recording ("cuda_graphs") fails; the step
    is then computed without it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossSum,
        *,
        device: torch.device,
        bf16: bool = False,
        grad_clip: float | None = None,
        compile: bool = False,
        graph: bool = False,
        said: Callable[[str, str], None] = lambda what, why: None,
    ):
        self._model, self._loss = model, loss
        self._device, self._bf16, self._grad_clip = device, bf16, grad_clip
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._graph = graph and device.type == "cuda"
        self._left = EAGER_STEPS
        self._stream = torch.cuda.Stream(device) if self._graph else None
        self._recorded: _Recorded | None = None
        self._said = said
        self._core = _core(model) if compile else None  # until it has been compiled
        if self._core is not None:
            # Shapes are fixed; other ones (validation's) are computed without compilation.
            self._core.compile(dynamic=False)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Logged:
        if self._recorded is not None and self._recorded.fits(inputs, targets):
            return self._recorded.replay(inputs, targets)
        if not self._graph or self._recorded is not None:
            return self._compute(inputs, targets)
        if self._left:
            self._left -= 1
            return self._beside(inputs, targets)
        if why := self._record(inputs, targets):
            self._graph = False
            self._said("cuda_graphs", why)
            return self._compute(inputs, targets)
        assert self._recorded is not None
        return self._recorded.replay(inputs, targets)

    def _record(self, inputs: Tensor, targets: Tensor) -> str:
        """Why it could not be done, or nothing. An error would hold what the step had kept for its
        backward pass, and a recording that breaks off leaves its stream in force."""
        with torch.cuda.stream(self._stream):
            try:
                self._recorded = _Recorded(
                    self._compute, self._params, inputs, targets, self._stream
                )
                return ""
            except RuntimeError as error:
                why = first_line(error)
        torch.cuda.empty_cache()
        return why

    def _beside(self, inputs: Tensor, targets: Tensor) -> Logged:
        """On the stream that records later: autograd remembers where each gradient was summed."""
        assert self._stream is not None
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            logged = self._compute(inputs, targets)
        now.wait_stream(self._stream)
        return logged

    def _compute(self, inputs: Tensor, targets: Tensor) -> Logged:
        for p in self._params:
            p.grad = None
        # Rounded weights that were kept between uses would be left in the graph's memory.
        estimate, extras = forward(self._forward, inputs, bf16=self._bf16, cached=not self._graph)
        total, parts = self._loss(estimate, targets, extras)
        total.backward()
        logged = {"loss": total.detach(), **{f"loss_{name}": part for name, part in parts.items()}}
        if self._grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(self._params, self._grad_clip)
            logged["grad_norm"] = norm.detach()
        return logged

    def _forward(self, inputs: Tensor) -> Any:
        if self._core is None:
            return self._model(inputs)
        core, self._core = self._core, None
        before = torch.get_rng_state()
        try:
            return self._model(inputs)
        except Exception as error:
            if not from_compiler(error):
                raise
            self._said("compile", first_line(getattr(error, "inner_exception", error)))
        core._compiled_call_impl = None
        torch.set_rng_state(before)
        return self._model(inputs)


class _Recorded:
    """A step's kernels and the memory that they read and write."""

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Logged],
        params: list[nn.Parameter],
        inputs: Tensor,
        targets: Tensor,
        stream: torch.cuda.Stream | None,
    ):
        self._inputs, self._targets = inputs.clone(), targets.clone()
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: the feed's may allocate and copy meanwhile.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logged = run(self._inputs, self._targets)
        except BaseException:
            for p in params:  # they lie in the memory of a graph that there is not
                p.grad = None
            raise
        self._grads = [(p, p.grad) for p in params]

    def fits(self, inputs: Tensor, targets: Tensor) -> bool:
        return inputs.shape == self._inputs.shape and targets.shape == self._targets.shape

    def replay(self, inputs: Tensor, targets: Tensor) -> Logged:
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        for p, grad in self._grads:  # some optimizers take them away
            p.grad = grad
        return self._logged


def _core(model: nn.Module) -> Any:
    """What is compiled: transforms to and from spectra stay outside."""
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return getattr(model, "core", model)


def from_compiler(error: BaseException) -> bool:
    """Whether torch.compile raised it, and not what it compiles."""
    return any(
        kind.__module__.startswith(("torch._dynamo", "torch._inductor"))
        for kind in type(error).__mro__
    )


def forward(
    model: Callable[[Tensor], Any], inputs: Tensor, *, bf16: bool, cached: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """(estimate, extras) of inputs (B, C, T): (B, S, C, T) float32, and what the model returns
    besides. bf16: rounded on the way. cached: each rounded weight is kept for its next use."""
    device = inputs.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=cached):
        estimate, extras = split_extras(model(inputs))
    return estimate.float(), extras


def estimated(model: nn.Module, inputs: Tensor, *, bf16: bool, compiled: bool = False) -> Tensor:
    """(B, C, T) -> (B, S, C, T) float32, rounded as in training. A compiled model is run as if it
    were none: lengths differ here, and each would be compiled anew."""
    aside = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with aside:
        return forward(model, inputs, bf16=bf16)[0]


def split_extras(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(estimate, extras) of what a model returned: some return the estimate alone."""
    return output if isinstance(output, tuple) else (output, {})
