"""What two ranks agree on, over gloo in two processes."""

import socket

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from bgray import ranks
from bgray.ranks import REASONS
from bgray.records import CTRL_C, NOTICE


def worker(rank, port, asked_by, reason):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank + 1.0)
    model.num_batches_tracked.fill_(rank + 7)
    ranks.share_buffers(model)
    assert model.running_mean.tolist() == [1.0] * 3  # rank 0's, which is the one that is saved
    assert model.num_batches_tracked.item() == 7

    value = torch.tensor([float(rank), 4.0])
    assert ranks.average(value).tolist() == [0.5, 4.0]
    assert value.tolist() == [float(rank), 4.0]  # not changed in place
    assert ranks.least(torch.tensor(10 - rank)).item() == 9

    asks = []

    def wanted():
        asks.append(True)
        return reason if rank == asked_by else ""

    stop = ranks.stop_together(wanted, 3, torch.device("cpu"))
    assert [stop() for _ in range(6)] == ["", "", reason] * 2
    assert len(asks) == 2
    both = ranks.stop_together(lambda: REASONS[1 + rank], 1, torch.device("cpu"))
    assert both() == NOTICE  # outweighs Ctrl-C: the machine goes, whoever asked
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_share_buffers_average_and_stop_together_whoever_is_asked():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, 1, CTRL_C), nprocs=2)
