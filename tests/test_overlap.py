import pytest
import torch
import torch.nn.functional as F

from bgray.overlap import overlap_add


@pytest.mark.parametrize(("length", "hop"), [(16, 4), (15, 4), (8, 8), (6, 8)])
@pytest.mark.parametrize("start", [0, 3])
def test_it_is_folds_moved_and_cut_or_filled_with_zeros(length, hop, start):
    torch.manual_seed(0)
    frames, window = torch.randn(2, 7, length + 2), torch.randn(length)
    size = hop * 6 + length
    weighted = (frames[..., :length] * window).transpose(1, 2)
    folded = F.fold(weighted, (1, size), (1, length), stride=(1, hop))[:, 0, 0]
    for num_samples in (start + size + 40, start + size, start + size - 5):
        found = overlap_add(frames, window, hop, num_samples, start)
        wanted = F.pad(folded, (start, 40))[:, :num_samples]
        torch.testing.assert_close(found, wanted)
