"""One training run: from an experiment and a context (here, in a Tune trial, on a Train worker) to
its folder."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bgray import checkpoint, data, probes, ranks, storage
from bgray.build import (
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    num_parameters,
)
from bgray.config import ConfigError, Experiment
from bgray.context import Context, set_numerics
from bgray.evaluation import Evaluator, means
from bgray.experiment import Prepared, build_recipe, data_hash, run_url
from bgray.loop import Every, NotFinite, State, fit, split_extras
from bgray.losses import LossSum
from bgray.observe import observe_inputs
from bgray.optim import describe_groups
from bgray.prefetch import Prefetched
from bgray.records import (
    ENDED,
    ITEMS,
    METRICS,
    PRUNED,
    TIMING,
    Run,
    close_from_outside,
    read_info,
    read_lines,
    reason,
)

FAR_APART = 30
"""Times that one weighted part of the loss may outweigh another without a warning."""
OUT_OF_MEMORY = "out of GPU memory: lower train.batch_size, or raise runtime.gpus if it shares one"


def run_to_its_end(experiment: Experiment, prepared: Prepared, context: Context) -> None:
    """`run_trial` for Ray: a loss that is not finite, or too little GPU memory, is a result and
    not an error to retry."""
    state = (read_info(run_url(experiment)) or {}).get("state")
    ended = state in (*ENDED, "out_of_memory")
    if context.world > 1 and ended:
        return  # Train starts the workers again after one of them ran out of memory
    try:
        run_trial(experiment, prepared, context)
    except NotFinite:
        pass
    except torch.cuda.OutOfMemoryError:
        if context.world == 1:
            return
        # The other ranks wait in a collective: only this one's death lets Train end them.
        close_from_outside(run_url(experiment), "out_of_memory", OUT_OF_MEMORY)
        raise


def run_trial(experiment: Experiment, prepared: Prepared, context: Context) -> dict[str, Any]:
    """Train, or go on from the last checkpoint, and leave everything in the run's folder; returns
    the last metrics.

    Raises what ends a run early, after run.json says so.
    """
    set_numerics(experiment, context)
    url = run_url(experiment)
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment).to(context.device)
    optimizer = build_optimizer(experiment, model)
    loss = build_loss(experiment).to(context.device)
    run = Run(url, experiment, data_hash(experiment)) if context.rank == 0 else None
    saved = checkpoint.load(url)  # on the CPU: a second copy in VRAM would count as the trial's own
    state, clock = State(), probes.Clock(context.device)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sums = {name: value.to(context.device) for name, value in saved["sums"].items()}
        state = State(saved["step"], sums, saved["count"])
        loss.restore(saved["loss"])
        clock.restore(saved["clock"])
        del saved
    else:
        observe_inputs(experiment, prepared, model, context.device)
    if context.world > 1:
        ranks.agree_on_start(state.step, url)
    session = _Session(experiment, prepared, context, url, run, model, loss, optimizer, clock)
    try:
        session.begin(state)
        session.replay()
        state = session.train(state)
    except BaseException as error:
        session.ended_by(error)
        raise
    session.end(state)
    return session.latest


class _Session:
    """The callbacks that `fit` gets: what they share."""

    def __init__(self, experiment, prepared, context, url, run, model, loss, optimizer, clock):
        self.experiment: Experiment = experiment
        self.prepared: Prepared = prepared
        self.context: Context = context
        self.url: str = url
        self.run: Run | None = run
        self.model: nn.Module = model
        self.loss: LossSum = loss
        self.optimizer: torch.optim.Optimizer = optimizer
        self.schedule: Any = build_schedule(experiment)
        self.clock: probes.Clock = clock
        self.evaluator = Evaluator(experiment, prepared, context, url)
        self.earlier: list[tuple[int, dict[str, Any]]] = []
        """Evaluations of an earlier try, up to the checkpoint that this one goes on from."""
        self.latest: dict[str, Any] = {}
        self.compiled = "no"
        self.said_of_parts = False

    # --- beginning and end ---

    def begin(self, state: State) -> None:
        self.earlier = [(s, m) for s, m in evaluations(self.url) if s <= state.step]
        for _, metrics in self.earlier:
            self._learn(metrics)
        baseline = self.evaluator.baseline()
        watched = getattr(self.schedule, "metric", None)
        if watched and watched not in means(baseline):
            text = f"'{watched}' has no value on these validation items; there is "
            raise ConfigError("schedule", [("metric", text + ", ".join(means(baseline)))])
        if self.run is None:
            return
        folder = storage.join(self.experiment.runtime.results, self.experiment.name)
        self.evaluator.write_listing(folder)
        self.run.begin(
            state.step,
            name=self.experiment.name,
            steps=self.experiment.train.steps,
            parameters=num_parameters(self.model),
            optimizer_groups=describe_groups(self.optimizer),
            data_hash=self.run.data_hash,
            manifest_hash=self.prepared.manifest.hash,
            validation=self.evaluator.hash,
            validation_items=self.evaluator.num_items,
            baseline=means(baseline),
            baseline_items=baseline,
            seed=self.experiment.train.seed,
            device=str(self.context.device),
            workers=self.context.world,
            threads=self.context.threads,
            feed=self.context.feed,
            feed_reason=self.context.feed_reason,
            step=state.step,
            metrics=self.latest,
        )

    def replay(self) -> None:
        """Tell the scheduler what an earlier try had reached, so that its rungs stand."""
        for step, metrics in self.earlier:
            self.context.report(step, {**metrics, "replayed": True})

    def end(self, state: State) -> None:
        if self.run is None:
            return
        finished = state.step >= self.experiment.train.steps
        self._finish(
            "finished" if finished else "interrupted", state.step, None if finished else "Ctrl-C"
        )

    def ended_by(self, error: BaseException) -> None:
        """Say in run.json how it ended. SystemExit is Tune's way of stopping a trial."""
        if self.run is None:
            return
        if isinstance(error, NotFinite):
            self._finish("diverged", error.step, str(error))
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            self._finish("out_of_memory", None, OUT_OF_MEMORY)
        elif isinstance(error, SystemExit):
            # Tune also ends a trial that has reached its last step.
            if self.run.info["state"] != "finished":
                self._finish("stopped", self.latest.get("step"), PRUNED)
        elif isinstance(error, KeyboardInterrupt):
            self._finish("interrupted", None, "Ctrl-C")
        else:
            # A full disk is the likeliest cause: then even this line cannot be written, and the
            # first error counts.
            with contextlib.suppress(OSError):
                self._finish("failed", None, reason(error))

    def _finish(self, state: str, step: int | None, reason: str | None) -> None:
        assert self.run is not None
        self.run.flush()
        known = {} if step is None else {"step": step}
        self.run.update(
            state=state,
            reason=reason,
            metrics=self.latest,
            timing=self.clock.summary(),
            compiled=self.compiled,
            **known,
        )

    # --- the loop ---

    def train(self, state: State) -> State:
        experiment, context = self.experiment, self.context
        train = experiment.train
        every = Every(
            log=experiment.runtime.log_every,
            evaluate=experiment.validation.every,
            checkpoint=experiment.runtime.checkpoint_every or experiment.validation.every,
        )
        if state.step >= train.steps:
            return state
        with Prefetched(
            self._feed(state.step),
            stall_seconds=experiment.runtime.stall_seconds,
            on_stall=self._on_stall,
        ) as batches:
            return fit(
                self._wrapped(),
                self.loss,
                self.optimizer,
                batches,
                steps=train.steps,
                report=self._report,
                state=state,
                evaluate=self._evaluate,
                save=self._save,
                every=every,
                schedule=self.schedule.scale,
                device=context.device,
                bf16=train.precision == "bf16",
                grad_clip=train.grad_clip,
                seed=train.seed,
                rank=context.rank,
                clock=self.clock,
                full_scale=self.evaluator.task.full_scale,
                **self._among_ranks(),
            )

    def _among_ranks(self) -> dict[str, Any]:
        context = self.context
        if context.world == 1:
            return {"stop": context.stop}
        every = self.experiment.runtime.log_every
        stop = ranks.stop_together(context.stop, every, context.device)
        return {"stop": stop, "average": ranks.average, "earliest": ranks.least}

    def _wrapped(self) -> nn.Module:
        model: Any = self.model
        if self.experiment.runtime.compile:
            # Transforms to and from spectra stay outside: compiled, they break at other lengths.
            getattr(model, "core", model).compile()
            self.compiled = "default"
        if self.context.world > 1:
            devices = [self.context.device] if self.context.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True
            )
        return model

    def _feed(self, start: int) -> Iterator[data.Batch]:
        recipe = build_recipe(self.experiment, self.prepared)
        stop, context = self.experiment.train.steps, self.context
        if context.feed == "process":
            return data.in_process(recipe, start, stop, context.rank, context.world)
        return data.on_ray(
            recipe,
            start,
            stop,
            context.rank,
            context.world,
            workers=self.experiment.runtime.data_workers,
            cpus=context.data_cpus,
        )

    def _on_stall(self, seconds: float) -> None:
        text = f"no batch for {seconds:.0f} s"
        if self.context.feed == "ray":
            import ray

            total, free = (
                ray.cluster_resources().get("CPU", 0),
                ray.available_resources().get("CPU", 0),
            )
            need = self.context.data_cpus
            text += f": Ray Data needs {need:g} CPU a task; {free:g} of {total:g} are free"
            if free < need:
                text += " (trials hold the rest: lower runtime.cpus or runtime.concurrency"
                text += ", or set runtime.feed=process)"
        else:
            text += f": a work unit takes longer than that, or {self.prepared.url} does not answer"
        self._warn(text)

    def _warn(self, text: str) -> None:
        self.context.warn(text)
        if self.run is not None:
            self.run.update(warnings=[*self.run.info.get("warnings", []), text][-20:])

    def _report(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "done":
            if self.run is not None and step >= self.experiment.train.steps:
                self._finish("finished", step, None)
            elif self.run is not None:
                self.run.update(step=step, metrics=self.latest, timing=self.clock.summary())
            self.context.report(step, {**self.latest, "step": step})
        elif self.run is not None:
            if kind == "train":
                self.run.append(METRICS, {"step": step, **values})
                self.run.append(TIMING, {"step": step, **self.clock.summary()})
            else:
                self.run.append(METRICS, {"step": step, "val": values})
                self.run.flush()
        if kind == "train":
            self._compare_parts(step, values)
        if kind == "validation":
            self._learn({"step": step, **values})

    def _learn(self, metrics: dict[str, Any]) -> None:
        """Of an evaluation, this try's or an earlier one's."""
        self.latest = metrics
        if hasattr(self.schedule, "observe"):
            scores = self.evaluator.task.scores
            metric = self.schedule.metric or next(iter(scores))
            self.schedule.observe(metrics.get(metric, math.nan), scores[metric])

    def _compare_parts(self, step: int, values: dict[str, Any]) -> None:
        """Says once when one part of the loss outweighs another: the small one hardly trains."""
        parts = {
            name: abs(pick.options["weight"] * values[f"loss_{name}"])
            for name, pick in self.experiment.loss.items()
        }
        large, small = max(parts, key=parts.__getitem__), min(parts, key=parts.__getitem__)
        if self.run is None or self.said_of_parts or parts[large] <= FAR_APART * parts[small]:
            return
        self.said_of_parts = True
        self._warn(
            f"loss parts far apart at step {step}: {large} is {parts[large]:.3g}, {small} "
            f"{parts[small]:.3g} (weighted): the smaller one hardly counts"
        )

    def _save(self, state: State) -> None:
        if self.run is None:
            return
        self.run.flush()
        checkpoint.save(
            self.run.url,
            state.step,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loss": self.loss.progress(),
                "step": state.step,
                "sums": state.sums,
                "count": state.count,
                "clock": self.clock.state(),
            },
        )

    # --- validation ---

    def _evaluate(self, _: nn.Module, step: int) -> dict[str, float]:
        if self.context.world > 1:
            ranks.share_buffers(self.model)
        self.model.eval()
        bf16 = self.experiment.train.precision == "bf16"

        def estimate(inputs: Tensor) -> Tensor:
            with (
                torch.autocast(self.context.device.type, torch.bfloat16)
                if bf16
                else contextlib.nullcontext()
            ):
                return split_extras(self.model(inputs))[0].float()

        scores = self.evaluator.scores(estimate, f"step-{step:06d}")
        if self.run is not None:
            self.run.append(ITEMS, {"step": step, **scores})
        return means(scores)


def evaluations(url: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, metrics) of every evaluation in a run's folder, as reported to Tune."""
    lines = read_lines(storage.join(url, METRICS))
    return [
        (line["step"], {"step": line["step"], **line["val"]}) for line in lines if "val" in line
    ]
