import math

import pytest
import torch

from bgray.models.heads import HEADS, num_logits, output_range, separate


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_softmax_gives_each_source_its_share_of_the_mixture():
    logits = torch.tensor([0.0, math.log(3)])[None, :, None]  # (1, 2, 1)
    mixture = torch.tensor([[[-0.8]]])
    sources = HEADS["softmax"](logits, mixture)
    torch.testing.assert_close(sources, torch.tensor([[[-0.2], [-0.6]]]))


def test_softmax_sources_have_the_sign_of_the_mixture_and_never_exceed_it():
    mixture = noise(2, 1, 50, seed=2)
    sources = HEADS["softmax"](10 * noise(2, 3, 50), mixture)
    assert (sources * mixture >= 0).all()
    assert (sources.abs() <= mixture.abs() * (1 + 1e-6)).all()


def test_softmax_cannot_say_stems_that_cancel():
    assert not HEADS["softmax"](10 * noise(1, 2, 9), torch.zeros(1, 1, 9)).any()


@pytest.mark.parametrize("head", ["softmax", "complementary"])
def test_sources_sum_to_the_mixture(head):
    mixture = noise(2, 1, 50, seed=2)
    sources = HEADS[head](noise(2, num_logits(head, 4), 50), mixture)
    assert sources.shape == (2, 4, 50)
    torch.testing.assert_close(sources.sum(1, keepdim=True), mixture, rtol=0, atol=1e-6)


def test_complementary_leaves_the_predicted_sources_as_they_are_and_adds_the_rest():
    predicted = torch.tensor([[[0.5], [-0.25]]])
    sources = HEADS["complementary"](predicted, torch.tensor([[[1.0]]]))
    assert sources.flatten().tolist() == [0.5, -0.25, 0.75]


def test_none_is_the_logits_and_tanh_saturates_them():
    logits = torch.tensor([[[-100.0, 0.5, 100.0]]])
    mixture = noise(1, 1, 3)
    assert torch.equal(HEADS["none"](logits, mixture), logits)
    torch.testing.assert_close(
        HEADS["tanh"](logits, mixture), torch.tensor([[[-1.0, math.tanh(0.5), 1.0]]])
    )


def test_only_tanh_has_a_range_of_its_own():
    bounded = {head: output_range(head) for head in HEADS if math.isfinite(output_range(head)[1])}
    assert bounded == {"tanh": (-1.0, 1.0)}


@pytest.mark.parametrize("head", ["softmax", "complementary"])
def test_a_head_that_would_copy_the_input_is_refused(head):
    with pytest.raises(ValueError, match=f"^head: {head} makes a single .* use none or tanh, or"):
        num_logits(head, 1)


def test_channels_folded_into_the_batch_come_back_beside_their_sources():
    logits = torch.arange(12.0).reshape(6, 2, 1)  # (B*C, S, T): 3 items in stereo, 2 sources
    sources = separate("none", logits, torch.zeros(3, 2, 1))
    assert sources.shape == (3, 2, 2, 1)
    assert sources[1, :, 0, 0].tolist() == [4.0, 5.0]  # item 1, left: row 2
    assert sources[1, :, 1, 0].tolist() == [6.0, 7.0]  # item 1, right: row 3


def test_sources_are_float32_after_bfloat16_layers():
    sources = separate("none", torch.ones(1, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 4))
    assert sources.dtype == torch.float32
