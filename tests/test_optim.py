import io
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bgray import optim
from bgray.models.wav_unet import WavUNet
from bgray.optim import describe_groups, roles
from bgray.schedules import WarmupStableDecay, set_lr

HEAVYBALL = ("psgd", "soap")


class Snake(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, channels))

    def forward(self, x):  # (B, C, T)
        alpha = self.alpha.mT
        return x + (alpha * x).sin().square() / (alpha + 1e-9)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))
        self.mask = nn.Parameter(torch.ones(3, 5))
        self.fixed = nn.Parameter(torch.ones(3, 5), requires_grad=False)


def small_net():
    """Two matrices of one shape, a depthwise one, a norm, a gain; (B, 1, 16) -> (B, 1, 16)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 8, 5, padding=2),
        weight_norm(nn.Conv1d(8, 8, 7, padding=3, groups=8)),
        Snake(8),
        nn.GroupNorm(1, 8),
        nn.Linear(16, 16),
        nn.Linear(16, 16),
        nn.ConvTranspose1d(8, 1, 1),
    )


def train(model, optimizer, steps, first=0, lr_scale=None):
    """Steps `first` to `steps` - 1 on data that depend on the step alone; their losses."""
    losses = []
    for step in range(first, steps):
        x = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(step))
        if lr_scale:
            set_lr(optimizer, lr_scale(step, steps))
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_grads(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


class Holder(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)


# --- roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(1, 8), {"weight": "matrix", "bias": "bias"}),
        (nn.Conv1d(1, 8, 5), {"weight": "matrix", "bias": "bias"}),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), {"weight": "matrix"}),
        (nn.Conv1d(8, 8, 7, groups=8, bias=False), {"weight": "depthwise"}),
        (nn.Conv1d(8, 16, 7, groups=8, bias=False), {"weight": "depthwise"}),
        (nn.ConvTranspose1d(8, 1, 4), {"weight": "matrix", "bias": "bias"}),
        (nn.ConvTranspose1d(8, 8, 4, groups=8, bias=False), {"weight": "depthwise"}),
        (nn.Embedding(10, 4), {"weight": "embedding"}),
        (nn.LayerNorm((4, 6)), {"weight": "norm", "bias": "norm"}),
        (nn.GroupNorm(1, 8), {"weight": "norm", "bias": "norm"}),
        (nn.InstanceNorm1d(8, affine=True), {"weight": "norm", "bias": "norm"}),
        (nn.RMSNorm(8), {"weight": "norm"}),
        (nn.PReLU(8), {"weight": "gain"}),
        (Snake(2048), {"alpha": "gain"}),
        (Table(), {"gamma": "gain", "mask": "matrix"}),
    ],
)
def test_a_role_follows_from_module_and_name(module, expected):
    assert roles(module) == expected


def test_recurrent_and_attention_weights_are_matrices_and_the_rest_biases():
    net = nn.ModuleList([nn.LSTM(1, 2, proj_size=1), nn.MultiheadAttention(4, 2, add_bias_kv=True)])
    for name, role in roles(net).items():
        assert role == ("bias" if "bias" in name else "matrix"), name


def test_weight_norm_splits_into_a_gain_and_the_weight_it_scales():
    net = nn.ModuleList(
        [
            weight_norm(nn.Conv1d(4, 8, 3)),
            weight_norm(nn.Conv1d(8, 8, 3, groups=8)),
            torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        ]
    )
    assert roles(net) == {
        "0.bias": "bias",
        "0.parametrizations.weight.original0": "gain",
        "0.parametrizations.weight.original1": "matrix",
        "1.bias": "bias",
        "1.parametrizations.weight.original0": "gain",
        "1.parametrizations.weight.original1": "depthwise",
        "2.bias": "bias",
        "2.parametrizations.weight.original": "matrix",
    }
    assert roles(weight_norm(nn.Linear(4, 4))) == {
        "bias": "bias",
        "parametrizations.weight.original0": "gain",
        "parametrizations.weight.original1": "matrix",
    }


def test_the_deprecated_weight_norm_of_dac_gets_the_same_roles():
    with pytest.warns(FutureWarning, match="deprecated"):
        conv = torch.nn.utils.weight_norm(nn.Conv1d(4, 8, 3))
    assert roles(conv) == {"bias": "bias", "weight_g": "gain", "weight_v": "matrix"}


# --- grouping -------------------------------------------------------------------------------------


def unshift_net_24():
    with torch.device("meta"):
        return WavUNet(
            channels=(1, 8, 64, 256, 512),
            blocks=(2, 2, 3, 4),
            factors=(8, 8, 4, 2),
            scale_vs_channels=(1, 1, 1, 1),
            bottleneck_blocks=0,
            patching=1,
            kernels=(41,),
            norm="layer",
            layout="v1",
        )


def test_output_24_of_the_unshift_log_splits_as_logged():
    model = unshift_net_24()
    for legacy in (False, True):  # the same, because it has no gain of two dimensions
        assert describe_groups(optim.muon(model, legacy_ndim=legacy)) == [
            {"optimizer": "muon", "tensors": 74, "parameters": 21_626_144, "lr": 5e-3},
            {"optimizer": "adamw", "tensors": 140, "parameters": 54_449, "lr": 5e-4},
        ]


def test_legacy_ndim_gives_muon_the_snake_and_weight_norm_gains_too():
    for options, tensors in (
        ({}, [5, 9]),
        ({"legacy_ndim": True}, [7, 7]),
        ({"depthwise": "adamw"}, [4, 10]),
    ):
        rows = describe_groups(optim.muon(small_net(), **options))
        assert [row["tensors"] for row in rows] == tensors


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    model = small_net()
    model[0].bias.requires_grad_(False)
    optimizer = optim.OPTIMIZERS[name](model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {row["optimizer"] for row in describe_groups(optimizer)} <= set(optim.OPTIMIZERS)


def test_muon_says_so_when_there_is_nothing_for_it():
    with pytest.raises(ValueError, match="muon: LayerNorm has no matrix to orthogonalise"):
        optim.muon(nn.LayerNorm(4))


# --- updates --------------------------------------------------------------------------------------


def test_muon_steps_a_rank_one_matrix_by_the_solved_amount():
    # Three iterations of a*s + b*s^3 + c*s^5 from s = 1 for the one singular value.
    s = 1.0
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    weight = nn.Parameter(torch.full((8, 2), 0.5))
    weight.grad = torch.full((8, 2), 3.0)  # unit direction 1 / 4 in each of 16 elements
    options = {"lr": 0.1, "weight_decay": 0.2, "ns_steps": 3, "ns_dtype": "fp32"}
    optim.muon(Holder([weight]), **options).step()
    step = 0.1 * math.sqrt(8 / 2) * s / 4
    torch.testing.assert_close(weight, torch.full((8, 2), 0.5 * (1 - 0.1 * 0.2) - step))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_the_steps_of_torch_muon(nesterov):
    # torch averages the gradient, (1 - momentum) * g, where we sum; the update is normalised, so
    # only bf16 rounding is left. The iteration amplifies it: measured, an update is 1.2 to 1.8 %
    # from its fp32 value. Without Nesterov's second term the weights would be 27 to 38 % off.
    ours, theirs = (with_grads((24, 60), (60, 24), (24, 60), (16, 16)) for _ in range(2))
    reference = torch.optim.Muon(
        theirs, lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=nesterov, ns_steps=5
    )
    optimizer = optim.muon(Holder(ours), lr=0.1, momentum=0.9, nesterov=nesterov, ns_steps=5)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            a.grad = b.grad.clone()
        optimizer.step()
        reference.step()
    for start, a, b in zip(with_grads(*(p.shape for p in ours)), ours, theirs, strict=True):
        moved = (b - start).norm()
        assert (a - b).norm() < 0.05 * moved


def test_a_zero_gradient_moves_nothing():
    (weight,) = with_grads((4, 6))
    before, weight.grad = weight.detach().clone(), torch.zeros(4, 6)
    optim.muon(Holder([weight])).step()
    assert torch.equal(weight, before)


def test_parameters_without_gradient_stay_and_keep_no_state():
    model = Holder(with_grads((4, 6), (4, 6), (5,), (5,)))
    before = [p.detach().clone() for p in model.params]
    model.params[0].grad = model.params[2].grad = None
    optimizer = optim.muon(model)
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.params, before, strict=True)]
    assert moved == [False, True, False, True]
    assert len(optimizer.state_dict()["state"]) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_the_adamw_half_of_muon_is_torch_adamw(fused):
    ours, theirs = (with_grads((6, 4), (7,), (1, 1, 9)) for _ in range(2))
    optimizer = optim.muon(Holder(ours), adamw_lr=0.01, betas=(0.8, 0.9), adamw_weight_decay=0.1)
    reference = torch.optim.AdamW(
        theirs[1:], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, fused=fused
    )
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(step))
            a.grad = b.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b) or not fused
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("adam", {"weight_decay": 0.1}, torch.optim.Adam),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.8, "nesterov": True}, torch.optim.SGD),
        ("sgd", {"momentum": 0.0, "nesterov": False}, torch.optim.SGD),
    ],
)
def test_adam_and_sgd_are_torchs(name, options, reference, fused):
    ours, theirs = (with_grads((6, 4), (7,)) for _ in range(2))
    optimizers = (
        optim.OPTIMIZERS[name](Holder(ours), lr=0.01, **options),
        reference(theirs, lr=0.01, fused=fused, **options),
    )
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(step))
            a.grad = b.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) or not fused
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nesterov_without_momentum_is_the_plain_step():
    (weight,) = with_grads((4, 6))
    expected = weight.detach() - 0.1 * weight.grad
    optim.sgd(Holder([weight]), lr=0.1, momentum=0.0, nesterov=True).step()
    torch.testing.assert_close(weight.detach(), expected)


def test_soap_descends_a_rotated_bowl_as_it_does_the_bowl_and_adam_does_not():
    start = torch.linspace(-1, 1, 60).reshape(6, 10)
    bowl = torch.diag(10.0 ** torch.arange(0, -3, -0.5))  # condition number 316
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]

    def losses(build, rotation):
        weight, curvature = nn.Parameter(rotation @ start), rotation @ bowl @ rotation.T
        optimizer = build(Holder([weight]), lr=0.01, weight_decay=0.0)
        values = []
        for _ in range(40):
            loss = (weight * (curvature @ weight)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return torch.tensor(values)

    straight, turned = losses(optim.soap, torch.eye(6)), losses(optim.soap, rotation)
    torch.testing.assert_close(turned, straight, rtol=1e-3, atol=0)
    straight, turned = losses(optim.adam, torch.eye(6)), losses(optim.adam, rotation)
    assert turned[-1] < 0.5 * straight[-1]


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_two_hundred_steps_halve_the_loss(name):
    model = small_net()
    losses = train(model, optim.OPTIMIZERS[name](model, lr=5e-3), 200)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_closure_runs_with_gradients_and_its_loss_comes_back():
    weight = nn.Parameter(torch.eye(3))
    optimizer = optim.muon(Holder([weight]), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == 3.0
    assert losses == sorted(losses, reverse=True)


# --- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(optim.PRESETS))
def test_a_preset_is_what_a_config_could_say_and_builds_with_its_rates(preset):
    from bgray.config import resolve_options

    options = dict(optim.PRESETS[preset])
    build = optim.OPTIMIZERS[options.pop("name")]
    resolved, problems = resolve_options(build, options, "optim")
    assert problems == []
    optimizer = build(small_net(), **resolved)
    rates = [row["lr"] for row in describe_groups(optimizer)]
    assert rates == [options[key] for key in ("lr", "adamw_lr") if key in options]


def test_the_best_rates_of_muon_are_its_defaults():
    options = dict(optim.PRESETS["muon_best"])
    best = optim.OPTIMIZERS[options.pop("name")](small_net(), **options)
    default = optim.muon(small_net(), legacy_ndim=True)
    assert describe_groups(best) == describe_groups(default)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(name):
    def build():
        model = small_net()
        return model, optim.OPTIMIZERS[name](model, lr=3e-3)

    lr_scale = WarmupStableDecay(warmup_steps=5, decay_share=0.5).scale
    whole, optimizer = build()
    losses = train(whole, optimizer, 60, lr_scale=lr_scale)

    model, optimizer = build()
    for step in range(20):
        train(model, optimizer, step + 1, first=step, lr_scale=lambda step, _: lr_scale(step, 60))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, 23)  # what is loaded must not share anything with what goes on

    model, optimizer = build()
    torch.manual_seed(99)  # no optimizer may depend on the global generator
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, 60, first=20, lr_scale=lr_scale) == losses[20:]
    for (key, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", HEAVYBALL)
def test_a_state_dict_in_memory_is_not_changed_by_loading_and_going_on(name):
    model = small_net()
    optimizer = optim.OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    steps = dict(state["heavyball"]["inner_group"])
    other = optim.OPTIMIZERS[name](small_net())
    other.load_state_dict(state)
    train(model, optimizer, 5)
    assert other.inner_group == state["heavyball"]["inner_group"] == steps


@pytest.mark.parametrize("name", HEAVYBALL)
def test_heavyball_keeps_no_pickled_code_in_its_checkpoint(name):
    optimizer = optim.OPTIMIZERS[name](small_net())
    assert list(optimizer.state_dict()["heavyball"]) == ["inner_group"]


@pytest.mark.parametrize("name", HEAVYBALL)
def test_heavyball_leaves_the_global_generator_alone(name):
    model = small_net()
    optimizer = optim.OPTIMIZERS[name](model)
    torch.manual_seed(7)
    train(model, optimizer, 2)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_heavyball_is_imported_by_nobody_but_psgd_and_soap():
    code = "import sys, bgray.optim; assert 'heavyball' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("adamw", {"lr": 0.0}, "adamw:\n  lr: must be above 0, got 0.0"),
        ("adamw", {"lr": math.nan}, "adamw:\n  lr: must be above 0, got nan"),
        ("adamw", {"betas": (0.9, 1.0)}, r"betas: must be in \[0, 1\), got \(0.9, 1.0\)"),
        ("muon", {"momentum": 1.0}, r"muon:\n  momentum: must be in \[0, 1\), got 1.0"),
        ("muon", {"ns_steps": 0}, r"ns_steps: must be in \[1, 100\), got 0"),
        ("muon", {"adamw_lr": -1.0}, "adamw_lr: must be above 0, got -1.0"),
        (
            "muon",
            {"legacy_ndim": True, "depthwise": "adamw"},
            "depthwise: must be 'muon' with legacy_ndim, got 'adamw'",
        ),
        ("sgd", {"momentum": 1.0}, r"sgd:\n  momentum: must be in \[0, 1\), got 1.0"),
        ("soap", {"precondition_frequency": 0}, r"soap:\n  .* must be in \[1, 100\), got 0"),
        (
            "psgd",
            {"lr": -1.0, "weight_decay": -0.1},
            "psgd:\n  lr: must be above 0, got -1.0\n  weight_decay: must be at least 0, got -0.1",
        ),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(name, options, text):
    with pytest.raises(ValueError, match=text):
        optim.OPTIMIZERS[name](small_net(), **options)
    assert {option for option, _ in optim.OPTIMIZERS[name].check(**options)} <= set(options)
    assert optim.OPTIMIZERS[name].check(**options)


def test_the_config_can_read_the_options_from_the_signatures():
    from bgray.config import resolve_options

    resolved, problems = resolve_options(optim.muon, {"lr": 0.02, "momentum": 2.0}, "optim")
    assert resolved["lr"] == 0.02
    assert resolved["adamw_lr"] is None
    assert problems == [("optim.momentum", "must be in [0, 1), got 2.0")]
    for entry in optim.OPTIMIZERS.values():
        assert resolve_options(entry, {}, "x")[1] == []
