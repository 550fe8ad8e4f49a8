import pytest
import torch
from dispatched import Dispatched

from bgray.models.inverse_stft import istft


@pytest.mark.parametrize(("n_fft", "hop"), [(64, 16), (62, 16), (64, 32), (1022, 256)])
@pytest.mark.parametrize("remainder", [0, 5])
def test_it_is_torchs_and_gives_the_signal_back(n_fft, hop, remainder):
    torch.manual_seed(0)
    x, window = torch.randn(3, 8 * n_fft + remainder), torch.hann_window(n_fft)
    spectrum = torch.stft(x, n_fft, hop, window=window, return_complex=True)
    length = (spectrum.shape[-1] - 1) * hop
    found = istft(spectrum, n_fft, hop, window, length)
    torch.testing.assert_close(found, x[:, :length], rtol=1e-4, atol=1e-5)
    expected = torch.istft(spectrum * 0.5, n_fft, hop, window=window, length=x.shape[-1])
    found = istft(spectrum * 0.5, n_fft, hop, window, x.shape[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_right_and_it_asks_the_device_nothing():
    window = torch.hann_window(16, dtype=torch.float64)
    spectrum = torch.randn(2, 9, 5, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: istft(s, 16, 4, window, 16), (spectrum,))
    with Dispatched(waits=False):
        istft(spectrum, 16, 4, window, 16).sum().backward()
