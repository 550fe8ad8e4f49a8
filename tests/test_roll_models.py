"""The piano-roll models of log 003: their counts, what their heads can say, and sampling."""

import math

import pytest
import torch
from torch import nn

from bgray.losses.roll import Kl
from bgray.models.roll_autoencoder import RollAutoencoder
from bgray.models.roll_rnn import RollRnn

ONE_STACK = {"encoder": (128,), "layers": 5}
NETS = [
    (RollAutoencoder, {"channels_in": 16, "widths": (4, 6, 8, 8)}),
    (RollAutoencoder, {"channels_in": 16, "widths": (4, 6, 8, 8), "variational": True}),
    (RollRnn, {"channels_in": 16, "encoder": (5, 7), "layers": 2}),
    (RollRnn, {"channels_in": 16, "encoder": (5,), "layers": 2, "cell": "rnn"}),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rolls(*shape, density=0.1):
    """(B, P, T) of 0 and 1."""
    return (torch.rand(shape, generator=seeded()) < density).float()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def build(kind, options, **more):
    """In evaluation mode, its batch norms as after training: fresh ones let signals die out."""
    torch.manual_seed(0)
    model = kind(**options, **more)
    for norm in norms(model):
        norm.momentum = 1.0
    with torch.no_grad():
        model(rolls(8, 16, 64))
    for norm in norms(model):
        norm.momentum = 0.1
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        (RollAutoencoder, {"head": "legacy"}, 7_068_879),  # experiment 01
        (RollAutoencoder, {}, 7_068_879 - 2),
        (RollAutoencoder, {"variational": True}, 7_068_879 - 2 + 512 * 257),
        (
            RollRnn,
            {"head": "legacy", "cell": "rnn", "encoder": (64,), "layers": 5, "bridge": "none"},
            119_344,  # 02
        ),
        (RollRnn, {"head": "legacy", "bridge": "none", **ONE_STACK}, 967_360),  # 03, 04
        (RollRnn, {"head": "legacy", "bridge": "batch_norm", **ONE_STACK}, 967_362),  # 04.3
        (RollRnn, {"head": "legacy"}, 2_487_622),  # 05
        (RollRnn, {}, 2_487_622 + 88 * 89),
    ],
)
def test_parameters_are_those_of_the_log(kind, options, count):
    with torch.device("meta"):
        model = kind(**options)
    assert sum(p.numel() for p in model.parameters()) == count


# --- what comes out -------------------------------------------------------------------------------


def test_the_legacy_autoencoder_has_no_negative_logit_and_the_linear_one_has():
    options = {"widths": (4, 6, 8, 8)}
    roll = rolls(3, 16, 40)
    for head, low in (("legacy", 0.0), ("linear", -math.inf)):
        model = build(RollAutoencoder, options, head=head).train()
        assert model.output_range == (low, math.inf)
        estimate = model(roll)
        assert (estimate < 0).any() == (head == "linear")
        assert isinstance(model.decoder[-1][-1], nn.ReLU if head == "legacy" else nn.Module)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_a_hidden_state_stays_within_one_however_large_the_weights_and_the_linear_head_does_not(
    cell,
):
    options = {"channels_in": 16, "encoder": (8,), "layers": 1, "bridge": "none", "cell": cell}
    for head, largest in (("legacy", 1.0), ("linear", math.inf)):
        model = build(RollRnn, options, head=head)
        assert model.output_range == (-largest, largest)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(50)
            peak = model(rolls(2, 16, 64)).abs().max()
        assert 0.9 < peak <= 1 if head == "legacy" else peak > 1


def test_the_first_steps_of_a_recurrent_net_do_not_see_the_later_ones_and_the_reverse_holds():
    model = build(*NETS[2])
    first = rolls(1, 16, 40)
    second = first.clone()
    second[..., 20:] = 1 - second[..., 20:]
    with torch.no_grad():
        a, b = model(first), model(second)
    assert torch.equal(a[..., :20], b[..., :20])
    assert not torch.equal(a[..., 20:], b[..., 20:])


def test_a_bridge_is_one_batch_norm_over_time_and_hidden_units_together_then_relu():
    model = build(RollRnn, {"channels_in": 16, "encoder": (5,), "layers": 1}).train()
    roll = rolls(3, 16, 40)
    hidden = model.encoder[0](roll.transpose(1, 2))  # (B, T, H)
    deviation = (hidden.var(unbiased=False) + 1e-5).sqrt()
    expected = ((hidden - hidden.mean()) / deviation).relu()
    torch.testing.assert_close(model.encode(roll), expected, rtol=0, atol=1e-5)


def test_an_odd_roll_comes_out_as_the_one_filled_up_with_silence_cut():
    model = build(*NETS[0])
    roll = torch.zeros(2, 20, 44)  # four blocks: multiples of 4
    roll[:, :17, :41] = rolls(2, 17, 41)
    with torch.no_grad():
        cut, whole = model(roll[:, :17, :41]), model(roll)
    assert torch.equal(cut, whole[..., :17, :41])


def test_a_note_eight_steps_later_comes_out_eight_steps_later():
    model = build(*NETS[0])
    roll = torch.zeros(1, 16, 256)
    roll[0, 5, 120:126] = 1
    with torch.no_grad():
        a, b = model(roll), model(roll.roll(8, dims=-1))
    middle = slice(64, 192)
    assert a[..., middle].std() > 1e-3
    torch.testing.assert_close(a.roll(8, dims=-1)[..., middle], b[..., middle], rtol=0, atol=1e-6)


# --- variational ----------------------------------------------------------------------------------


def test_a_variational_net_draws_while_training_and_decodes_the_mean_otherwise():
    model, roll = build(*NETS[1]), rolls(2, 16, 40)
    with torch.no_grad():
        estimate, extras = model(roll)
        assert tuple(extras) == model.extras == Kl.extras
        assert torch.equal(estimate, model.decode(extras["mean"])[..., :40])
        model.train()
        torch.manual_seed(0)
        first, second = model.encode(roll)[0], model.encode(roll)[0]
        torch.manual_seed(0)
        again, moments = model.encode(roll)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    noise = (first - moments["mean"]) / (0.5 * moments["log_variance"]).exp()
    torch.manual_seed(0)
    torch.testing.assert_close(noise, torch.randn_like(noise), rtol=0, atol=1e-4)


def test_the_divergence_alone_drives_the_latent_to_the_prior():
    model, roll = build(*NETS[1]).train(), rolls(2, 16, 40)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    for _ in range(40):
        estimate, extras = model(roll)
        loss = Kl()(estimate, roll[:, None], extras)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.05 * values[0]


# --- sampling -------------------------------------------------------------------------------------


def test_the_latents_have_the_shapes_that_the_log_drew():
    with torch.device("meta"):
        convolutional, recurrent = RollAutoencoder(), RollRnn()
    assert convolutional.draw(1920, seeded()).shape == (1, 256, 240, 11)
    assert recurrent.draw(1920, seeded()).shape == (1, 1920, 256)
    assert convolutional.draw(1, seeded(), 2).shape == (2, 256, 1, 11)


def test_a_variational_latent_is_normal_and_the_others_are_uniform_on_zero_to_one():
    for kind, options in NETS:
        latent = build(kind, options).draw(4096, seeded())
        if options.get("variational"):
            assert latent.mean().item() == pytest.approx(0, abs=0.05)
            assert latent.std().item() == pytest.approx(1, abs=0.05)
        else:
            assert latent.min() >= 0
            assert latent.max() < 1
            assert latent.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("kind", "options"), NETS)
def test_music_is_made_of_any_length_from_the_generator_alone(kind, options):
    model = build(kind, options)
    first = model.generate(37, seeded(), count=2)
    torch.manual_seed(99)
    assert torch.equal(first, model.generate(37, seeded(), count=2))
    assert not torch.equal(first, model.generate(37, seeded(1), count=2))
    assert first.shape == (2, 1, 16, 37)
    assert not first.requires_grad


@pytest.mark.parametrize(("kind", "options"), NETS)
def test_sampling_decodes_with_the_network_that_was_trained(kind, options):
    model, roll = build(kind, options), rolls(1, 16, 40)
    with torch.no_grad():
        output, latent = model(roll), model.encode(roll)
    estimate = output[0] if isinstance(output, tuple) else output
    latent = latent[0] if isinstance(latent, tuple) else latent
    model.draw = lambda *_: latent
    torch.testing.assert_close(model.generate(40, seeded()), estimate, rtol=0, atol=1e-6)


def test_sampling_as_the_log_did_leaves_out_the_bridge_between_the_decoder_stacks():
    model = build(*NETS[2])
    latent = model.draw(40, seeded())
    with torch.no_grad():
        first, second = model.decoder
        expected = model.head(second(first(latent))).transpose(1, 2)[:, None]
    legacy = model.generate(40, seeded(), skip_bridges=True)
    assert torch.equal(legacy, expected)
    assert not torch.allclose(legacy, model.generate(40, seeded()), atol=1e-4)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (RollRnn, {"encoder": ()}, "encoder: is empty; give at least one hidden size"),
        (RollRnn, {"encoder": (8, 0)}, "encoder: 0 must be at least 1"),
        (RollRnn, {"layers": 0}, "layers: 0 must be at least 1"),
        (RollAutoencoder, {"widths": (8,)}, "widths: 1 entries; give at least 2"),
        (RollAutoencoder, {"widths": (8, -1)}, "widths: -1 must be at least 1"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_its_value(kind, options, text):
    with pytest.raises(ValueError, match=text):
        kind(**options)
