"""Which parameter gets which optimizer, by its role, and the settings that the logs used."""

import copy
import functools
import warnings
from collections.abc import Callable
from math import inf
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from bgray.muon import Muon
from bgray.problems import refuse
from bgray.schedules import SCHEDULES as SCHEDULES
from bgray.schedules import Ranges, out_of_range
from bgray.schedules import set_lr as set_lr

Group = dict[str, Any]
Role = Literal["matrix", "depthwise", "gain", "bias", "norm", "embedding"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
MATRICES = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def roles(model: nn.Module) -> dict[str, Role]:
    """Role of every trainable parameter by its name, in the order of `model.named_parameters()`.

    The module's type decides, not the number of dimensions: a Snake alpha (1, 1, 4C) and the gain
    of a weight norm (C, 1, 1) have three dimensions and are gains all the same.
    """
    params = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: _role(model, name, p) for name, p in params}


def _role(model: nn.Module, name: str, param: torch.Tensor) -> Role:
    path, _, leaf = name.rpartition(".")
    if leaf in ("original0", "weight_g") and param.squeeze().ndim <= 1:
        return "gain"  # weight_norm's g, new and old spelling; its v takes the weight's role
    # The owner of conv.parametrizations.weight.original1 is conv.
    owner = model.get_submodule(path.partition("parametrizations.")[0].rstrip("."))
    leaf = path.rpartition(".")[2] if "parametrizations." in path else leaf
    if isinstance(owner, NORMS):
        return "norm"
    if "bias" in leaf:  # also an RNN's bias_ih_l0, attention's in_proj_bias and bias_k
        return "bias"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "depthwise" if 1 < owner.groups == owner.in_channels else "matrix"
    if isinstance(owner, MATRICES):
        return "matrix"
    return "matrix" if sum(size > 1 for size in param.shape) > 1 else "gain"


def _trainable(model: nn.Module, wanted: Callable[[Role, Any], bool]) -> list[nn.Parameter]:
    kinds, params = roles(model), dict(model.named_parameters())
    return [params[name] for name, role in kinds.items() if wanted(role, params[name])]


def describe_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """One row a parameter group: optimizer, tensors, parameters (a count) and the present lr."""
    rows = []
    for group in optimizer.param_groups:
        counts = {
            "tensors": len(group["params"]),
            "parameters": sum(map(torch.numel, group["params"])),
        }
        rows.append({"optimizer": group["optimizer"], **counts, "lr": group["lr"]})
    return rows


RANGES: Ranges = {
    "above 0": (lambda v: 0 < v < inf, {"lr", "adamw_lr", "eps"}),
    "at least 0": (lambda v: 0 <= v < inf, {"weight_decay", "adamw_weight_decay"}),
    "in [0, 1)": (lambda v: 0 <= v < 1, {"momentum", "betas"}),
    "in [1, 100)": (lambda v: 1 <= v < 100, {"ns_steps", "precondition_frequency"}),
}


def check(**options: Any) -> list[tuple[str, str]]:
    """All problems that the types do not show, as (option, value and the way out)."""
    problems = out_of_range(RANGES, options)
    if options.get("legacy_ndim") and options.get("depthwise") == "adamw":
        problems.append(("depthwise", "must be 'muon' with legacy_ndim, got 'adamw'"))
    return problems


def checked(build: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """`build` that raises ValueError for options out of range, and has `check` for the config."""

    @functools.wraps(build)
    def checked_build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        refuse(check(**options), build.__name__)  # the defaults are in range
        return build(model, **options)

    checked_build.__dict__["check"] = check
    return checked_build


def _one_group(model: nn.Module, optimizer: str, weight_decay: float) -> tuple[Group, bool | None]:
    """(a group of all trainable parameters, whether torch can update them in few kernels)."""
    params = _trainable(model, lambda role, p: True)
    group = {"params": params, "optimizer": optimizer, "weight_decay": weight_decay}
    return group, _fusible(params) or None


def _fusible(params: list[nn.Parameter]) -> bool:
    # Also on a CPU, where a third to a quarter of the time is left.
    return all(p.device.type in ("cuda", "cpu") for p in params)


@checked
def adamw(
    model: nn.Module,
    *,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """torch's AdamW, one group: weight decay is for every role, as in the logs."""
    group, fused = _one_group(model, "adamw", weight_decay)
    return torch.optim.AdamW([group], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


@checked
def adam(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """torch's Adam, one group; `weight_decay` is L2, added to the gradient before the moments."""
    group, fused = _one_group(model, "adam", weight_decay)
    return torch.optim.Adam([group], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


@checked
def sgd(
    model: nn.Module,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """torch's SGD, one group; `weight_decay` is L2. Without momentum Nesterov's step is plain."""
    group, fused = _one_group(model, "sgd", weight_decay)
    nesterov = nesterov and momentum > 0  # torch refuses the other, which is the same
    return torch.optim.SGD([group], lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


@checked
def muon(
    model: nn.Module,
    *,
    lr: float = 5e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    ns_steps: int = 6,
    ns_dtype: Literal["bf16", "fp32"] = "bf16",
    depthwise: Literal["muon", "adamw"] = "muon",
    legacy_ndim: bool = False,
    adamw_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    adamw_weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """Muon for matrices, viewed as (first dimension, all the rest), and AdamW for all other roles.

    `adamw_lr` None is lr / 10. `depthwise`: who gets depthwise convolutions; Muon takes (C, 1, k)
    as one C x k matrix. `ns_dtype` is bf16 on the CPU too, so that a run is the same mathematics
    on both; measured on 2 cores with AVX512-BF16 that is 2 to 2.5 times faster than fp32 from
    256 x 1024 up and slower only below 64 x 64. `legacy_ndim` splits by dimensions (two and more:
    Muon), as the unshift logs did, gains of Snake and weight norm included.
    """
    wanted = ("matrix", "depthwise") if depthwise == "muon" else ("matrix",)

    def is_matrix(role: Role, param: torch.Tensor) -> bool:
        return param.ndim >= 2 if legacy_ndim else role in wanted

    matrices = _trainable(model, is_matrix)
    others = _trainable(model, lambda role, p: not is_matrix(role, p))
    if not matrices:
        raise ValueError(f"muon: {type(model).__name__} has no matrix to orthogonalise, use adamw")
    first: Group = {"params": matrices, "optimizer": "muon", "lr": lr, "momentum": momentum}
    first |= {"nesterov": nesterov, "weight_decay": weight_decay}
    first |= {"ns_steps": ns_steps, "ns_dtype": ns_dtype}
    second: Group = {"params": others, "optimizer": "adamw", "betas": tuple(betas), "eps": eps}
    second |= {"lr": lr / 10 if adamw_lr is None else adamw_lr, "weight_decay": adamw_weight_decay}
    second |= {"fused": _fusible(others)}
    return Muon([first, second] if others else [first], defaults={})


def _heavyball(compile: bool) -> Any:
    """The package, told whether to compile: one setting for the whole process."""
    import heavyball  # seconds to import, so only where it is used

    heavyball.utils.compile_mode = "max-autotune-no-cudagraphs" if compile else None
    return heavyball


@functools.cache
def _repeatable(kind: Any) -> Any:
    class Repeatable(kind):
        """A `kind` of heavyball's whose noise and checkpoints depend on nothing but the step."""

        def step(self, closure: Any = None) -> Any:
            group = self.param_groups[0]
            group["base_lr"] = group["lr"]  # otherwise it warns at each change of the rate
            group["noise_step"] = group.get("noise_step", 0) + 1
            devices = {p.device for p in group["params"] if p.is_cuda}
            # It draws from the global generator. Left at that, workers whose generators differ
            # (dropout) would get different preconditioners and so drift apart under DDP.
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                # Said once, at the first step, of the scale that `psgd` chooses on purpose.
                warnings.filterwarnings("ignore", "It's recommended to use precond_init_scale")
                torch.manual_seed(group["noise_step"])
                return super().step(closure)

        def state_dict(self) -> dict[str, Any]:
            # Without its pickled schedule: loading that would run code from the checkpoint.
            counters = {"inner_group": dict(self.inner_group)}
            return {**super().state_dict(), "heavyball": counters}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            counters = {"inner_group": dict(state_dict["heavyball"]["inner_group"])}
            super().load_state_dict({**state_dict, "heavyball": counters})
            # torch casts state to the parameter's dtype, but the lower bounds are float64.
            for i, p in enumerate(self.param_groups[0]["params"]):
                if i in state_dict["state"]:
                    saved = copy.deepcopy(state_dict["state"][i])
                    move = functools.partial(torch.Tensor.to, device=p.device)
                    self.state[p] = tree_map_only(torch.Tensor, move, saved)

    return Repeatable


@checked
def psgd(
    model: nn.Module,
    *,
    lr: float = 3e-4,
    momentum: float = 0.9,
    weight_decay: float = 0.01,
    compile: bool = False,
) -> torch.optim.Optimizer:
    """heavyball's PSGD-Kron for all parameters; like it, `step` sets every gradient to None.

    The preconditioner starts at scale 1, heavyball's default when the logs were written. Its
    present one is guessed from the first gradients, and refuses them where a fresh ConvNeXt block
    (scale 1e-6) makes them as small as 1e-12.

    `compile` autotunes at the first step (seconds to minutes) and holds for the whole process.
    """
    heavyball = _heavyball(compile)
    group = {"params": _trainable(model, lambda role, p: True), "optimizer": "psgd"}
    kron = _repeatable(heavyball.PSGDKron)
    return kron([group], lr=lr, beta=momentum, weight_decay=weight_decay, precond_init_scale=1.0)


@checked
def soap(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 2,
    compile: bool = False,
) -> torch.optim.Optimizer:
    """heavyball's SOAP for all parameters; like it, `step` sets every gradient to None.

    Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321), which
    moves every `precondition_frequency` steps. Vectors, and sides longer than 2048, keep their own
    basis. `compile` as in `psgd`.
    """
    group = {"params": _trainable(model, lambda role, p: True), "optimizer": "soap"}
    return _repeatable(_heavyball(compile).SOAP)(
        [group],
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
    )


OPTIMIZERS = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "muon": muon,
    "psgd": psgd,
    "soap": soap,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Log 001 until output25. The best rates, 001's from output27 on and all of 002's, are the
    # defaults; legacy_ndim because both logs split by dimensions.
    "muon_001": {"name": "muon", "lr": 2e-3, "adamw_lr": 3e-4, "legacy_ndim": True},
    "muon_best": {"name": "muon", "lr": 5e-3, "adamw_lr": 5e-4, "legacy_ndim": True},
    # 001's output37; after it 3e-4, 5e-4, 1e-4, and momentum 0.8 and 0.95 at 3e-4.
    "psgd_001": {"name": "psgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01},
    "psgd_best": {"name": "psgd", "lr": 3e-4, "momentum": 0.9, "weight_decay": 0.01},
    "soap_001": {"name": "soap", "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.01},
    "waveform_adam": {"name": "adam", "lr": 1e-2},  # 000's first; 1e-4 in its report
    "roll_adam": {"name": "adam", "lr": 1e-3},
    "umx_adam": {"name": "adam", "lr": 1e-3, "weight_decay": 1e-5},  # with the schedule `plateau`
}
"""The optimizers of the logs, as what a config's `optim:` would say."""
