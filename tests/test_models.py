"""What every model promises, on a tiny configuration of each."""

import pytest
import torch

from bgray.models import MODELS

TINY = {
    "wav_unet": {
        "channels": (8, 16, 32),
        "blocks": (1, 2),
        "factors": (2, 4),
        "scale_vs_channels": (1, 2),
        "bottleneck_blocks": 1,
        "patching": 2,
        "kernels": (3, 5),
    },
}
SAMPLES = 256


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations gain nothing from threads and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name](**TINY[name])


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_model_has_a_tiny_configuration():
    assert TINY.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
class TestContract:
    def test_output_has_a_source_axis_and_the_same_length(self, name):
        assert build(name)(noise(3, 2, SAMPLES)).shape == (3, 1, 2, SAMPLES)

    def test_an_item_does_not_see_the_other_items_of_its_batch(self, name):
        model = build(name).eval()
        batch = noise(4, 1, SAMPLES)
        other = batch.clone()
        other[1:] = noise(3, 1, SAMPLES, seed=2)
        with torch.no_grad():
            torch.testing.assert_close(model(batch)[0], model(other)[0], rtol=0, atol=1e-6)

    def test_stereo_equals_two_mono_passes(self, name):
        model = build(name).eval()
        stereo = noise(2, 2, SAMPLES)
        with torch.no_grad():
            left, right = model(stereo[:, :1]), model(stereo[:, 1:])  # (B, 1, 1, T) each
            both = model(stereo)  # (B, 1, 2, T)
        torch.testing.assert_close(both, torch.cat([left, right], 2), rtol=0, atol=1e-6)

    def test_gradient_reaches_every_parameter(self, name):
        model = build(name)
        model(noise(2, 1, SAMPLES)).square().mean().backward()
        dead = [
            key
            for key, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
        ]
        assert dead == []

    def test_wrong_length_names_the_multiple_and_the_two_nearest_lengths(self, name):
        model = build(name)
        m = model.length_multiple
        message = f"length {2 * m + 1} .* multiple of {m}; .* lengths are {2 * m} and {3 * m}$"
        with pytest.raises(ValueError, match=message):
            model(noise(1, 1, 2 * m + 1))
        with pytest.raises(ValueError, match=f"length {m - 1} .* are {m} and {2 * m}$"):
            model(noise(1, 1, m - 1))

    def test_state_dict_round_trip_gives_the_same_output(self, name):
        first, second = build(name, seed=0), build(name, seed=1)
        audio = noise(1, 1, SAMPLES)
        with torch.no_grad():
            assert not torch.equal(first(audio), second(audio))
            second.load_state_dict(first.state_dict())
            assert torch.equal(first(audio), second(audio))

    def test_same_seed_same_bits(self, name):
        first, second = build(name).state_dict(), build(name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_fresh_net_is_neither_silent_nor_loud(self, name):
        audio = noise(2, 1, SAMPLES)
        with torch.no_grad():
            gain = build(name)(audio).std() / audio.std()
        assert 0.01 < gain < 10

    def test_sixty_steps_halve_the_loss_on_one_batch(self, name):
        model = build(name)
        audio = noise(4, 1, SAMPLES)
        target = 0.5 * audio.roll(3, dims=-1)[:, None]  # (B, 1, 1, T)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            loss = (model(audio) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * target.square().mean().item()  # below what silence scores
        assert losses[-1] < 0.5 * losses[0]

    def test_meta_device_builds_the_same_shapes(self, name):
        with torch.device("meta"):
            meta = MODELS[name](**TINY[name])
        shapes = {key: p.shape for key, p in meta.state_dict().items()}
        assert shapes == {key: p.shape for key, p in build(name).state_dict().items()}
