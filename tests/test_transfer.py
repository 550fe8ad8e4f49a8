import numpy as np
import pytest
import torch

from bgray.data import Batch
from bgray.transfer import Sent, ahead, received, to_device

CPU = torch.device("cpu")


def stream(closed):
    try:
        for step in range(3):
            x = np.full((2, 1, 4), step - 1, np.int16)
            yield Batch(step, x, x[:, None])
    finally:
        closed.append(True)


def test_on_a_cpu_batches_pass_as_they_are_and_the_stream_is_closed_behind_them():
    closed = []
    steps = ahead(stream(closed), CPU)
    first = next(steps)
    assert isinstance(first, Batch)
    steps.close()
    assert closed == [True]


@pytest.mark.parametrize("full_scale", [32768.0, 1.0, 127.0])
def test_every_int16_value_becomes_the_float_that_division_gives(full_scale):
    samples = np.arange(-32768, 32768, dtype=np.int16)[None, None]
    found = to_device(samples, CPU, full_scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(samples.astype(np.float32)) / full_scale)


def test_received_gives_both_halves_with_their_shapes():
    x = np.full((2, 1, 4), 16384, np.int16)
    inputs, targets = received(Batch(0, x, np.stack([x, -x], axis=1)), CPU, 32768.0)
    assert inputs.shape == (2, 1, 4)
    assert targets.shape == (2, 2, 1, 4)
    assert targets[0, :, 0, 0].tolist() == [0.5, -0.5]


@pytest.mark.gpu
def test_on_a_gpu_they_are_there_before_they_are_asked_for_and_hold_the_same():
    cuda = torch.device("cuda")
    for step, sent in enumerate(ahead(stream([]), cuda)):
        assert isinstance(sent, Sent)
        assert sent.inputs.dtype == torch.int16
        inputs, targets = received(sent, cuda, 32768.0)
        assert torch.equal(inputs.cpu(), torch.full((2, 1, 4), (step - 1) / 32768.0))
        assert targets.shape == (2, 1, 1, 4)


@pytest.mark.gpu
def test_a_step_is_recorded_while_another_thread_copies_batches():
    """Recording is of one thread; that of the feed allocates on host and device meanwhile."""
    import threading

    from bgray.losses import LossSum
    from bgray.losses.waveform import L1
    from bgray.step import EAGER_STEPS, Step

    cuda, done, errors = torch.device("cuda"), threading.Event(), []

    def endless():
        step = 0
        while not done.is_set():
            step += 1
            x = np.zeros((8, 1, 1024 * (1 + step % 64)), np.int16)  # always another size
            yield Batch(step, x, x[:, None])

    def feed():
        try:
            for sent in ahead(endless(), cuda):
                received(sent, cuda, 32768.0)
        except BaseException as error:
            errors.append(error)

    class Net(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input)[:, None]

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        said = []
        net, loss = Net(64, 64).to(cuda), LossSum({"l1": (L1(), 1.0)})
        step = Step(net, loss, device=cuda, graph=True, said=lambda *text: said.append(text))
        x = torch.randn(4, 1, 64, device=cuda)
        for _ in range(EAGER_STEPS + 20):
            step(x, x[:, None])
    finally:
        done.set()
        thread.join()
    assert (said, errors) == ([], [])
