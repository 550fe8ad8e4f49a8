import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bgray.data import Batch
from bgray.loop import Every, NotFinite, State, fit
from bgray.losses import LossSum
from bgray.losses.waveform import L1
from bgray.optim import adamw
from bgray.transfer import to_device


class Gain(nn.Module):
    """(B, C, T) -> (B, 1, C, T), times one learned number."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[0.5]]))

    def forward(self, x):
        return (x * self.gain)[:, None]


def batches(start, stop):
    for step in range(start, stop):
        x = np.random.default_rng(step).integers(-9000, 9000, (2, 1, 16), dtype=np.int16)
        yield Batch(step, x, x[:, None])


class Explodes(LossSum):
    """Not finite from the n-th call on."""

    def __init__(self, call):
        super().__init__({"l1": (L1(), 1.0)})
        self.call, self.calls = call, 0

    def forward(self, estimate, target, extras=None):
        self.calls += 1
        total, parts = super().forward(estimate, target, extras)
        return total * (math.nan if self.calls >= self.call else 1.0), parts


def run(*, steps=10, state=None, stream=None, loss=None, **options):
    torch.manual_seed(0)
    model = Gain()
    reports = []
    state = fit(
        model,
        loss or LossSum({"l1": (L1(), 2.0)}),
        options.pop("optimizer", None) or adamw(model, lr=0.01),
        stream or batches(state.step if state else 0, steps),
        steps=steps,
        state=state,
        report=lambda kind, step, values: reports.append((kind, step, values)),
        **options,
    )
    return model, state, reports


def test_losses_are_logged_as_means_between_lines_part_by_part():
    _, state, reports = run(every=Every(log=5))
    lines = [(step, values) for kind, step, values in reports if kind == "train"]
    assert [step for step, _ in lines] == [5, 10]
    assert state.step == 10
    for _, values in lines:
        assert values["loss"] == pytest.approx(2 * values["loss_l1"])
    _, _, single = run(every=Every(log=1))
    each = [values["loss"] for kind, _, values in single if kind == "train"]
    assert lines[0][1]["loss"] == pytest.approx(np.mean(each[:5]), rel=1e-6)


def test_a_loop_resumed_in_the_middle_of_a_log_window_logs_the_same_mean():
    whole = run(every=Every(log=4))[2]
    model = Gain()
    optimizer = adamw(model, lr=0.01)
    reports = []

    def part(start, stop, state):
        return fit(
            model,
            LossSum({"l1": (L1(), 2.0)}),
            optimizer,
            batches(start, 10),
            steps=10,
            state=state,
            report=lambda *line: reports.append(line),
            every=Every(log=4),
            stop=lambda: state.step == stop,
        )

    state = part(0, 3, State())
    assert state.step == 3
    part(3, None, state)
    assert reports == whole


def test_evaluation_and_checkpoint_come_before_the_step_is_called_done():
    order = []
    fit(
        model := Gain(),
        LossSum({"l1": (L1(), 1.0)}),
        adamw(model, lr=0.01),
        batches(0, 4),
        steps=4,
        report=lambda kind, step, values: order.append((kind, step)),
        evaluate=lambda model, step: {"val": 0.0},
        save=lambda state: order.append(("save", state.step)),
        every=Every(log=4, evaluate=2, checkpoint=4),
    )
    assert order == [
        ("validation", 2),
        ("done", 2),
        ("train", 4),
        ("validation", 4),
        ("save", 4),
        ("done", 4),
    ]


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_loss_that_is_not_finite_is_named_by_its_exact_step(step):
    with pytest.raises(NotFinite, match=f"at step {step} ") as caught:
        run(loss=Explodes(step), every=Every(log=5))
    assert caught.value.step == step


def test_on_the_cpu_nothing_is_trained_after_the_step_that_is_not_finite():
    loss, saved = Explodes(3), []
    with pytest.raises(NotFinite, match="loss not finite at step 3 ") as caught:
        run(loss=loss, every=Every(log=100, checkpoint=2), save=lambda s: saved.append(s.step))
    assert (loss.calls, saved) == (3, [2])
    (values,) = caught.value.values
    assert math.isnan(values["loss"])
    assert math.isfinite(values["loss_l1"])  # the part itself was in order
    assert values["lr_0"] == 0.01
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.step, str(again)) == (3, str(caught.value))


def test_among_ranks_the_values_of_the_step_are_kept_until_all_ask():
    loss, met = Explodes(3), []
    with pytest.raises(NotFinite) as caught:
        run(
            loss=loss,
            every=Every(log=5),
            earliest=lambda step: step,
            together=lambda values: met.append(values) or [None, values],
        )
    assert loss.calls == 5
    assert caught.value.step == 3
    assert caught.value.values == met
    assert met[0]["loss_l1"] == pytest.approx(run(every=Every(log=1))[2][2][2]["loss_l1"])


def test_a_part_that_is_not_finite_is_named():
    error = NotFinite(4, 0, [{"loss": math.nan, "loss_l1": 0.1, "loss_mel": math.inf}])
    assert str(error).startswith("loss_mel not finite at step 4 (batch 3 of seed 0); ")
    error = NotFinite(4, 0, [{"loss": 0.1, "loss_l1": 0.1, "grad_norm": math.inf}])
    assert str(error).startswith("grad_norm not finite at step 4 ")


def test_an_evaluation_better_than_all_before_it_is_saved_at_once():
    scores, saved = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.0, 10: 4.0}, []
    best = []

    def improved(found):
        better = not best or found["val"] < min(best)
        best.append(found["val"])
        return better

    run(
        evaluate=lambda model, step: {"val": scores[step]},
        every=Every(log=10, evaluate=2, checkpoint=5),
        improved=improved,
        save=lambda state: saved.append(state.step),
    )
    assert saved == [2, 4, 5, 8, 10]


def test_a_state_that_is_on_disk_is_not_written_again_while_no_batch_comes():
    class Ends:
        asked = True

        def __iter__(self):
            return iter(())

    saved = []
    _, state, _ = run(
        state=State(5), stream=Ends(), stop=lambda: True, save=lambda s: saved.append(s.step)
    )
    assert (state.step, saved) == (5, [])


def test_a_gap_in_the_stream_is_an_error_and_so_is_its_early_end():
    with pytest.raises(RuntimeError, match="batch of step 2 was due, but step 3 came"):
        run(stream=iter([*batches(0, 2), *batches(3, 9)]))
    with pytest.raises(RuntimeError, match="batch of step 2 was due, but the stream ended"):
        run(stream=batches(0, 2))


def test_stopping_saves_at_the_step_where_it_was_asked():
    saved = []
    _, state, _ = run(stop=lambda: True, save=lambda state: saved.append(state.step))
    assert saved == [1]
    assert state.step == 1


def test_the_schedule_scales_the_learning_rate_of_every_step():
    model = Gain()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    seen = []
    fit(
        model,
        LossSum({"l1": (L1(), 1.0)}),
        optimizer,
        batches(0, 3),
        steps=3,
        report=lambda kind, step, values: seen.append(values.get("lr_scale")),
        every=Every(log=1),
        schedule=lambda step, steps: 1 - step / steps,
    )
    assert seen[:3] == pytest.approx([1, 2 / 3, 1 / 3])


def test_gradient_norm_is_logged_before_clipping():
    _, _, free = run(every=Every(log=1), grad_clip=1e9)
    _, _, clipped = run(every=Every(log=1), grad_clip=1e-9)
    norm = [values["grad_norm"] for kind, _, values in free if kind == "train"][0]
    assert norm > 0.01
    assert clipped[0][2]["grad_norm"] == pytest.approx(norm)


def test_shared_batches_are_never_written_to():
    samples = np.full((1, 1, 4), 16384, np.int16)
    samples.setflags(write=False)
    audio = to_device(samples, torch.device("cpu"))
    audio.mul_(2)
    assert samples.tolist() == [[[16384] * 4]]
    assert audio.tolist() == [[[1.0] * 4]]


def test_a_stop_that_is_asked_for_while_no_batch_comes_leaves_a_checkpoint():
    import threading

    from bgray.prefetch import Prefetched

    never, saved, asked = threading.Event(), [], []

    def slow():
        yield from batches(0, 3)
        never.wait(20)

    def stop():
        return bool(asked)

    with Prefetched(slow(), stall_seconds=10, stop=stop) as stream:
        timer = threading.Timer(0.5, lambda: asked.append(True))
        timer.start()
        _, state, _ = run(stream=stream, stop=stop, save=lambda state: saved.append(state.step))
        timer.join()
        never.set()
    assert state.step == 3
    assert saved == [3]
