"""A run under a measurement's control: as a user's run is, with the loop's parts watched, or in the
plainest loop that does the same work; some steps at a time, when it is its turn."""

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bgray import bench_plain, probes
from bgray.bench_turns import Link
from bgray.choices import choose
from bgray.config import Experiment
from bgray.experiment import Prepared, build_recipe

NEVER = 2**40
WARM_UP = {"cpu": (2, 3.0), "cuda": (10, 0.0)}
"""Least steps and seconds: a GPU's first ones compile, choose kernels and record the graph."""

ONE_BY_ONE, FIRST_WRITTEN, IN_MEMORY = "one_by_one", "first_written", "in_memory"
"""What no option switches: an optimizer that updates each tensor by itself, net and losses as one
writes them first (bgray.bench_plain), a few batches again and again instead of a feed."""
IN_MEMORY_BATCHES = 8


def threads_of(experiment: Experiment) -> int:
    return experiment.runtime.threads or os.cpu_count() or 1


def pinned(experiment: Experiment, device: torch.device, **changed: Any) -> Experiment:
    """With all that it would choose by itself written down, so that its length can be another;
    `changed`: fields of Choices that are to be different. It neither evaluates nor saves."""
    made = dataclasses.replace(choose(experiment, device), **changed).applied(experiment)
    train = dataclasses.replace(made.train, steps=NEVER)
    runtime = dataclasses.replace(
        made.runtime,
        device=device.type,
        workers=1,
        feed_cache="none",
        checkpoint_every=NEVER,
    )
    validation = dataclasses.replace(made.validation, every=NEVER, items=1, clips=0)
    return dataclasses.replace(made, train=train, runtime=runtime, validation=validation)


class Turns:
    """Counts the steps of a loop, answers after each lot that was ordered, and then waits.

    An order is (steps before the clock starts, timed steps); the answer has their `seconds` and
    `cpu_seconds` of the whole process, `wait_seconds` for batches, and the peaks of memory so far.
    The first answer, after the warm-up, is the seconds of its last step.
    """

    def __init__(self, link: Link, device: torch.device):
        self._link, self._device = link, device
        self._began = self._mark = self._now()
        self._cpu, self._waiting, self._wait = 0.0, False, 0.0
        self._done, self._lead, self._steps = 0, 0, 0
        self._warm = False

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def watched(self, batches: Any) -> "_Watched":
        return _Watched(batches, self._wait_for)

    @contextlib.contextmanager
    def _wait_for(self) -> Iterator[None]:
        began, self._waiting = time.perf_counter(), True
        yield
        self._waiting, self._wait = False, self._wait + time.perf_counter() - began

    def stop(self) -> str:
        """To be asked after every step; why to stop, once there are no more orders. It is asked
        while a batch is waited for, too: that is no step."""
        if self._waiting:
            return ""
        self._done += 1
        if not self._warm:
            return self._warming_up()
        if self._done == self._lead:
            self._start()
        if self._done < self._lead + self._steps:
            return ""
        seconds = self._now() - self._mark
        found = {"steps": self._steps, "seconds": seconds, "wait_seconds": self._wait}
        found["cpu_seconds"] = time.process_time() - self._cpu
        return self._next({**found, **probes.memory(self._device)})

    def _warming_up(self) -> str:
        steps, seconds = WARM_UP[self._device.type]
        now = self._now()
        passed, self._mark = now - self._mark, now
        if self._done == 1:
            self._began = now
        if self._done < steps or (self._done < 50 and now - self._began < seconds):
            return ""
        self._warm = True
        return self._next(passed)

    def _next(self, answer: Any) -> str:
        self._link.answer(answer)
        if (order := self._link.next()) is None:
            return "measured"
        self._done, (self._lead, self._steps) = 0, order
        if not self._lead:
            self._start()
        return ""

    def _start(self) -> None:
        self._mark, self._cpu, self._wait = self._now(), time.process_time(), 0.0


class _Watched:
    """The same batches; `around` is entered while one is waited for."""

    def __init__(self, batches: Any, around: Callable[[], Any]):
        self._batches, self._around = batches, around

    @property
    def asked(self) -> bool:
        return getattr(self._batches, "asked", False)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._batches)
        while True:
            with self._around():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def run(
    experiment: Experiment,
    prepared: Prepared,
    fit: Callable[..., Any],
    *,
    context: Any = None,
    stop: Callable[[], str] = lambda: "",
) -> None:
    """`run_trial` in this process, in a folder that is removed, with `fit` in place of loop.fit."""
    from bgray import trial
    from bgray.context import Context, pick_device

    with tempfile.TemporaryDirectory() as folder:
        runtime = dataclasses.replace(experiment.runtime, results=folder)
        context = context or Context(
            device=pick_device(runtime.device), threads=threads_of(experiment)
        )
        context.stop, context.warn = stop, lambda text: None
        real, trial.fit = trial.fit, fit
        try:
            trial.run_trial(dataclasses.replace(experiment, runtime=runtime), prepared, context)
        finally:
            trial.fit = real


def as_trial(
    link: Link, experiment: Experiment, prepared: Prepared, but: str = "", context: Any = None
) -> None:
    """A candidate: the run as it is, from its own feed. but: ONE_BY_ONE, FIRST_WRITTEN or
    IN_MEMORY."""
    from bgray.context import pick_device
    from bgray.loop import fit

    turns = Turns(link, pick_device(experiment.runtime.device))

    def watched(model: Any, loss: Any, optimizer: Any, batches: Any, **options: Any) -> Any:
        if but == ONE_BY_ONE:
            bench_plain.one_by_one(optimizer)
        if but == IN_MEMORY:
            batches = _again(batches)
        plain = bench_plain.first_written() if but == FIRST_WRITTEN else contextlib.nullcontext()
        with plain:
            return fit(model, loss, optimizer, turns.watched(batches), **options)

    run(experiment, prepared, watched, context=context, stop=turns.stop)


def _again(batches: Any) -> Iterator[Any]:
    kept = list(itertools.islice(batches, IN_MEMORY_BATCHES))
    for step in itertools.count():
        yield kept[step % len(kept)]._replace(step=step)


def plainest(link: Link, experiment: Experiment, prepared: Prepared) -> None:
    """A candidate: the loop that anybody would write first. Eager, float32, net and losses as one
    writes them first, each tensor updated by itself; batches made in between, by the same
    thread."""
    from bgray import feed
    from bgray.build import build_loss, build_model, build_optimizer, build_task
    from bgray.context import pick_device
    from bgray.models import depthwise
    from bgray.observe import observe_inputs
    from bgray.step import split_extras

    device = pick_device(experiment.runtime.device)
    torch.set_num_threads(threads_of(experiment))
    depthwise.use("library", device)
    probes.reset_memory(device)
    torch.manual_seed(experiment.train.seed)
    model: Any = build_model(experiment).to(device)
    optimizer = build_optimizer(experiment, model)
    bench_plain.one_by_one(optimizer)
    loss = build_loss(experiment).to(device)
    observe_inputs(experiment, prepared, model, device)
    model.train()
    full_scale, clip = build_task(experiment).full_scale, experiment.train.grad_clip
    turns = Turns(link, device)
    batches = feed.in_process(build_recipe(experiment, prepared), 0, NEVER)
    with bench_plain.first_written():
        for step, batch in enumerate(turns.watched(batches), 1):
            inputs = torch.from_numpy(batch.inputs).to(device).float() / full_scale
            targets = torch.from_numpy(batch.targets).to(device).float() / full_scale
            estimate, extras = split_extras(model(inputs))
            total, _ = loss(estimate, targets, extras)
            optimizer.zero_grad()
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            loss.advance(step, lambda values: values)
            if step % experiment.runtime.log_every == 0:
                total.item()
            if turns.stop():
                break


def on_ray(link: Link, experiment: Experiment, prepared: Prepared) -> None:
    """A candidate: the run in a worker of a Ray of its own, its batches from Ray Data."""
    from bgray.session import ray_session

    with ray_session() as ray:
        from ray.util.queue import Queue

        from bgray.resources import Plan, of_cluster

        plan = Plan.make(experiment, 1, of_cluster(ray))
        orders, answers = Queue(), Queue()
        work = ray.remote(max_retries=0)(_in_worker).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
        running = work.remote(Link(orders, answers), experiment, prepared, plan)
        while True:
            link.answers.put(_either(ray, answers, running))
            order = link.next()
            orders.put(order)
            if order is None:
                ray.get(running)
                return


def _either(ray: Any, answers: Any, running: Any) -> Any:
    from ray.util.queue import Empty

    while True:
        with contextlib.suppress(Empty):
            return answers.get(timeout=2)
        if ray.wait([running], timeout=0)[0]:
            ray.get(running)
            raise RuntimeError("the run on Ray ended before it was told to")


def _in_worker(link: Link, experiment: Experiment, prepared: Prepared, plan: Any) -> None:
    from bgray.context import on_ray as context_on_ray

    as_trial(link, experiment, prepared, context=context_on_ray(experiment, plan))
