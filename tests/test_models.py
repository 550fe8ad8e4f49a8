"""What every model promises, on tiny configurations of each."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bgray.models import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chords(*shape, seed=1):
    """(B, P, T) of 0 and 1: about one pitch in eight sounds, each for half the time or more."""
    rng = torch.Generator().manual_seed(seed)
    b, p, t = shape
    start = torch.rand(b, p, 1, generator=rng) * t / 2
    time = torch.arange(t)
    sounding = (
        (start <= time) & (time < start + t / 2) & (torch.rand(b, p, 1, generator=rng) < 1 / 8)
    )
    return sounding.float()


def delayed(audio, sources):
    """(B, C, T) -> (B, S, C, T): every source is the input three samples later at half the size."""
    return 0.5 * audio.roll(3, dims=-1)[:, None].expand(-1, sources, -1, -1)


def echo(audio, sources):
    """(B, C, T) -> (B, S, C, T): the input plus `delayed`, for nets that add to their input."""
    return audio[:, None] + delayed(audio, sources)


def shares(audio, sources):
    """(B, C, T) -> (B, S, C, T): the s-th source is 4^-s of the input, scaled to sum to 3/4 of it
    for one source and to all of it for more, as what only shares the input out can learn."""
    weights = 0.25 ** torch.arange(sources, dtype=torch.float32)
    weights *= (0.75 if sources == 1 else 1) / weights.sum()
    return audio[:, None] * weights[:, None, None]


def itself(audio, sources):
    """(B, C, T) -> (B, S, C, T): every source is the input."""
    return audio[:, None].expand(-1, sources, -1, -1)


@dataclass(frozen=True)
class Tiny:
    """A model's settings for the contract: `options` of the config, the rest as a task gives it.

    inputs: makes a batch from its shape. target: what 60 steps at `lr` shall learn from them.
    loss: of estimate and target. gain: bounds for std(fresh output) / std(input).
    dead: parameters that no gradient reaches by design; the reason belongs beside the entry.
    """

    options: dict[str, Any]
    channels: int = 1
    sources: int = 1
    samples: int = 256
    sample_rate: int = 8000
    inputs: Callable[..., torch.Tensor] = noise
    target: Callable[[torch.Tensor, int], torch.Tensor] = delayed
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.mse_loss
    lr: float = 3e-3
    gain: tuple[float, float] = (0.01, 10.0)
    dead: tuple[str, ...] = ()


WAV_UNET = {
    "channels": (8, 16, 32),
    "blocks": (1, 2),
    "factors": (2, 4),
    "scale_vs_channels": (1, 2),
    "bottleneck_blocks": 1,
    "patching": 2,
    "kernels": (3, 5),
}
WAV_UNET_V1 = {
    **WAV_UNET,
    "channels": (1, 8, 16),
    "factors": (8, 4),
    "scale_vs_channels": (1, 2),
    "bottleneck_blocks": 0,
    "patching": 1,
    "layout": "v1",
}
SPEC_UNET = {
    "channels": (2, 8, 16),
    "blocks": (1, 1),
    "factors": (2, 2),
    "scale_vs_channels": (1, 2),
    "kernel": 3,
    "n_fft": 30,
    "hop": 8,
}
SPEC_DIFFERENCE = {
    **SPEC_UNET,
    "channels": (4, 8, 16),
    "scale_vs_channels": (2, 2),
    "bottleneck_blocks": 1,
    "layout": "v2",
    "output": "difference",
}
ROLL = {"channels": 16, "samples": 64, "inputs": chords, "target": itself, "lr": 1e-2}
ROLL_CNN = {"widths": (8, 16, 16)}
ROLL_RNN = {"encoder": (24,), "layers": 1}
CONV_SEPARATOR = {"kernels": (15, 7, 3), "inner_channels": 8}
WAVENET = {"channels": 8, "stacks": 2, "layers": 3, "tail_channels": (8, 8)}
# Nothing follows the residual sum of a WaveNet's last block, whose convolution the original has.
WAVENET_DEAD = ("blocks.5.residual.weight", "blocks.5.residual.bias")
OPEN_UNMIX = {"n_fft": 64, "hop": 16, "bandwidth_hz": 3000.0, "hidden": 24, "layers": 1}
OPEN_UNMIX_MR = {
    **OPEN_UNMIX,
    "order": "act_bn",
    "out_bn": False,
    "output_mean_init": 0.0,
    "rnn": "gru",
    "extra_resolutions": (2, 4),
}
# The first word of a key is the model's name, the rest tells its variants apart.
TINY: dict[str, Tiny] = {
    "conv_separator": Tiny(CONV_SEPARATOR, sources=2, lr=1e-2),
    "conv_separator residual present_input": Tiny(
        {**CONV_SEPARATOR, "residual": True, "present_input": True}, sources=2
    ),
    "conv_separator softmax": Tiny({**CONV_SEPARATOR, "head": "softmax"}, sources=3, target=shares),
    "conv_separator complementary": Tiny(
        {**CONV_SEPARATOR, "head": "complementary"}, sources=2, target=shares
    ),
    "conv_separator tanh": Tiny({**CONV_SEPARATOR, "head": "tanh"}),
    "conv_separator long": Tiny({**CONV_SEPARATOR, "kernels": (255, 1)}),
    "wave_unet": Tiny({"levels": 3, "step": 16, "kernel": 9, "up_kernel": 5}, lr=3e-3),
    "gru_separator": Tiny({"kernel": 15, "channels": 8, "hidden": 8}, lr=1e-2),
    "open_unmix": Tiny(OPEN_UNMIX, channels=2, sources=2, target=shares),
    "open_unmix mr": Tiny(OPEN_UNMIX_MR, channels=2, target=shares, lr=1e-2),
    "roll_autoencoder": Tiny(ROLL_CNN, **ROLL),
    "roll_autoencoder variational": Tiny({**ROLL_CNN, "variational": True}, **ROLL),
    "roll_rnn": Tiny(ROLL_RNN, **ROLL),
    "roll_rnn stacked": Tiny({**ROLL_RNN, "encoder": (24, 32)}, **ROLL),
    "roll_rnn legacy rnn": Tiny(
        {**ROLL_RNN, "head": "legacy", "cell": "rnn", "bridge": "none"}, **ROLL
    ),
    "spec_unet": Tiny(SPEC_UNET),
    "spec_unet v2 difference": Tiny(SPEC_DIFFERENCE, target=echo, lr=1e-2),
    "wav_unet": Tiny(WAV_UNET),
    "wav_unet difference": Tiny({**WAV_UNET, "output": "difference"}, target=echo),
    "wav_unet product": Tiny({**WAV_UNET, "output": "product"}, target=shares),
    "wav_unet v1": Tiny(WAV_UNET_V1, target=echo, lr=1e-2),
    "wav_unet v1 skip_conv": Tiny({**WAV_UNET_V1, "skip_conv": True}, target=echo, lr=1e-2),
    "wavenet": Tiny(WAVENET, sources=2, lr=1e-2, dead=WAVENET_DEAD),
    "wavenet shared": Tiny({**WAVENET, "shared_convolutions": True}, gain=(0.001, 10.0)),
}


def entry(key):
    return MODELS[key.split()[0]]


def build(key, seed=0):
    """The key's model, with the framework's arguments that its signature asks for."""
    tiny = TINY[key]
    offered = {
        "sample_rate": tiny.sample_rate,
        "num_sources": tiny.sources,
        "channels_in": tiny.channels,
    }
    wanted = inspect.signature(entry(key)).parameters
    torch.manual_seed(seed)
    return entry(key)(**tiny.options, **{k: v for k, v in offered.items() if k in wanted})


def batch(key, items, *, samples=None, seed=1):
    """(B, C, T) of the key's kind of input."""
    tiny = TINY[key]
    return tiny.inputs(items, tiny.channels, samples or tiny.samples, seed=seed)


def estimate_of(output):
    return output[0] if isinstance(output, tuple) else output


def folds_channels(key):
    """Whether every channel passes alone, as a mono clip would."""
    return TINY[key].channels == 1 and "channels_in" not in inspect.signature(entry(key)).parameters


KEYS = [key for key in TINY if key.split()[0] in MODELS]


def test_every_model_has_a_tiny_configuration():
    """Whoever adds a model adds its line to TINY above: the contract below then tests it."""
    assert {key.split()[0] for key in TINY} == set(MODELS)


@pytest.mark.parametrize("key", KEYS)
class TestContract:
    def test_output_has_a_source_axis_and_the_same_length(self, key):
        tiny = TINY[key]
        model = build(key)
        estimate = estimate_of(model(batch(key, 3)))
        assert estimate.shape == (3, tiny.sources, tiny.channels, tiny.samples)
        assert estimate.dtype == torch.float32
        assert getattr(model, "num_sources", 1) == tiny.sources

    @pytest.mark.parametrize("less", [0, 1, 37])
    def test_any_length_comes_back_as_it_was_or_is_refused_with_the_nearest_two(self, key, less):
        model = build(key).eval()
        m = getattr(model, "length_multiple", 1)
        samples = 2 * max(TINY[key].samples, m) - less
        if samples % m == 0:
            with torch.no_grad():
                estimate = estimate_of(model(batch(key, 1, samples=samples)))
            assert estimate.shape[-1] == samples
            assert estimate[..., -1].any()  # not merely padded
            return
        below = samples // m * m
        message = f"length {samples} .* multiple of {m}; .* lengths are {below} and {below + m}$"
        with pytest.raises(ValueError, match=message):
            model(batch(key, 1, samples=samples))
        with pytest.raises(ValueError, match=f"length {m - 1} .* are {m} and {2 * m}$"):
            model(batch(key, 1, samples=m - 1))

    def test_extras_are_those_it_names(self, key):
        model = build(key)
        output = model(batch(key, 2))
        extras = output[1] if isinstance(output, tuple) else {}
        assert tuple(extras) == getattr(model, "extras", ())
        assert all(tensor.isfinite().all() for tensor in extras.values())

    def test_an_item_does_not_see_the_other_items_of_its_batch(self, key):
        model = build(key).eval()
        first = batch(key, 4)
        other = torch.cat([first[:1], batch(key, 3, seed=2)])
        with torch.no_grad():
            a, b = estimate_of(model(first))[0], estimate_of(model(other))[0]
            alone = estimate_of(model(first[:1]))[0]
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(a, alone, rtol=0, atol=1e-6)

    def test_gradient_reaches_every_parameter(self, key):
        model = build(key)
        estimate_of(model(batch(key, 2))).square().mean().backward()
        dead = [
            name
            for name, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
        ]
        assert dead == list(TINY[key].dead)

    def test_state_dict_round_trip_gives_the_same_output(self, key):
        first, second = build(key, seed=0).eval(), build(key, seed=1).eval()
        audio = batch(key, 1)
        with torch.no_grad():
            expected = estimate_of(first(audio))
            assert not torch.equal(expected, estimate_of(second(audio)))
            second.load_state_dict(first.state_dict())
            assert torch.equal(expected, estimate_of(second(audio)))

    def test_same_seed_same_bits(self, key):
        first, second = build(key), build(key)
        values = second.state_dict()
        assert all(torch.equal(value, values[name]) for name, value in first.state_dict().items())
        audio = batch(key, 2)
        with torch.no_grad():
            first, second = estimate_of(first.eval()(audio)), estimate_of(second.eval()(audio))
        assert torch.equal(first, second)

    def test_fresh_net_is_neither_silent_nor_loud(self, key):
        audio = batch(key, 2)
        with torch.no_grad():
            gain = estimate_of(build(key)(audio)).std() / audio.std()
        low, high = TINY[key].gain
        assert low < gain < high

    def test_output_stays_within_its_range(self, key):
        model = build(key).eval()
        low, high = getattr(model, "output_range", (-torch.inf, torch.inf))
        assert low < high
        with torch.no_grad():
            for scale in (0.0, 1.0, 100.0):
                estimate = estimate_of(model(scale * batch(key, 2)))
                assert estimate.isfinite().all()
                assert low <= estimate.min()
                assert estimate.max() <= high

    def test_what_is_to_be_compiled_has_no_fourier_transform_and_no_complex_number(self, key):
        model = build(key).eval()
        core = getattr(model, "core", model)
        assert core in list(model.modules())
        calls = []
        core.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(batch(key, 1))
            assert calls
            with Recorder() as recorder:
                core(*calls[0][0], **calls[0][1])
        assert not [name for name in recorder.names if "fft" in name or "complex" in name]

    def test_sixty_steps_halve_the_loss_on_one_batch(self, key):
        tiny, model = TINY[key], build(key)
        audio = batch(key, 4)
        target = tiny.target(audio, tiny.sources)  # (B, S, C, T)
        optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.lr)
        losses = []
        for _ in range(60):
            loss = tiny.loss(estimate_of(model(audio)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        # Below what zeros score, too.
        assert losses[-1] < 0.5 * tiny.loss(torch.zeros_like(target), target).item()

    def test_meta_device_builds_the_same_shapes(self, key):
        with torch.device("meta"):
            meta = build(key)
        shapes = {name: p.shape for name, p in meta.state_dict().items()}
        assert shapes == {name: p.shape for name, p in build(key).state_dict().items()}
        assert all(p.is_meta for p in meta.state_dict().values())


@pytest.mark.parametrize("key", [key for key in KEYS if folds_channels(key)])
def test_stereo_equals_two_mono_passes(key):
    model = build(key).eval()
    stereo = torch.cat([batch(key, 2), batch(key, 2, seed=2)], 1)  # (B, 2, T)
    with torch.no_grad():
        mono = [estimate_of(model(stereo[:, c : c + 1])) for c in (0, 1)]  # (B, S, 1, T) each
        both = estimate_of(model(stereo))  # (B, S, 2, T)
    torch.testing.assert_close(both, torch.cat(mono, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", [key for key in KEYS if hasattr(entry(key), "observe")])
def test_input_statistics_depend_on_the_inputs_and_not_on_how_they_are_batched(key):
    first, second, fresh = build(key), build(key), build(key)
    audio = batch(key, 4)
    first.observe([audio])
    second.observe(iter([audio[:1], audio[1:]]))
    changed = False
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name])
        changed |= not torch.equal(value, fresh.state_dict()[name])
    assert changed
    assert estimate_of(first(audio)).isfinite().all()


class Recorder(TorchDispatchMode):
    """Collects the names of the operations that run inside it, and `complex` if one returns it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, torch.Tensor) and out.is_complex():
            self.names.append("complex")
        return out
