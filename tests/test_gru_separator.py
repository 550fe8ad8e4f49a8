import pytest
import torch
import torch.nn.functional as F

from bgray.models.gru_separator import GruSeparator


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(num_sources=1, **options):
    torch.manual_seed(0)
    return GruSeparator(num_sources=num_sources, **options)


def test_the_log_s_net_has_5659_parameters():
    assert sum(p.numel() for p in build().parameters()) == 5_659


def test_net_is_convolution_and_one_gru_step_a_sample():
    model, audio = build(2, kernel=5), noise(3, 1, 20)
    x = F.conv1d(audio, model.first.weight, model.first.bias, padding=2).relu()
    cell = torch.nn.GRUCell(10, 3)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in model.core.gru.state_dict().items()})
    state, states = torch.zeros(3, 3), []
    for t in range(20):
        state = cell(x[:, :, t], state)
        states.append(state)
    y = torch.stack(states, dim=2).relu()  # (B, hidden, T)
    expected = F.conv1d(y, model.core.out.weight, model.core.out.bias)
    torch.testing.assert_close(model(audio), expected[:, :, None])


def test_an_output_sample_sees_all_of_the_past_and_half_a_kernel_of_the_future():
    torch.manual_seed(0)
    model = GruSeparator(num_sources=1, kernel=9, hidden=8)
    audio = noise(1, 1, 60).requires_grad_()
    (seen,) = torch.autograd.grad(model(audio)[0, 0, 0, 30], audio)
    assert seen[0, 0, :35].all()
    assert not seen[0, 0, 35:].any()


def test_a_head_that_would_copy_the_input_is_refused():
    with pytest.raises(ValueError, match="complementary makes a single source equal to the input"):
        build(1, head="complementary")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 550}, "kernel: 550 is even and would change the length; use 549 or 551"),
        ({"hidden": 0}, "hidden: 0 must be at least 1"),
        ({"head": "relu"}, "head: 'relu' is not one of softmax, none, complementary, tanh"),
    ],
)
def test_options_that_do_not_fit_are_named_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
