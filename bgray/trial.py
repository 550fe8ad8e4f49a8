"""One training run: from an experiment and a context (here, in a Tune trial, on a Train worker) to
its folder."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bgray import checkpoint, data, feed, pbt, probes, ranks, storage, transfer
from bgray.build import (
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    num_parameters,
)
from bgray.choices import Choices, choose
from bgray.config import ConfigError, Experiment
from bgray.context import Context, set_numerics, why_stalled
from bgray.evaluation import Evaluator, means
from bgray.experiment import Prepared, build_recipe, data_hash, run_url
from bgray.feed_cache import UnitCache
from bgray.logbook import Logbook
from bgray.loop import Every, NotFinite, State, fit
from bgray.losses import LossSum
from bgray.observe import observe_inputs
from bgray.optim import describe_groups
from bgray.prefetch import Prefetched
from bgray.records import (
    CTRL_C,
    ENDED,
    MAX_DEATHS,
    PRUNED,
    Run,
    Superseded,
    close_from_outside,
    died_in_vain,
    read_info,
    reason,
)
from bgray.resources import feed_cache
from bgray.step import estimated

OUT_OF_MEMORY = "out of GPU memory: lower train.batch_size, or raise runtime.gpus if it shares one"


def run_to_its_end(experiment: Experiment, prepared: Prepared, context: Context) -> None:
    """`run_trial` for Ray: a loss that is not finite, too little GPU memory or a mistake in what
    was given is a result and not an error to retry."""
    info = read_info(run_url(experiment)) or {}
    ended = info.get("state") in (*ENDED, "out_of_memory")
    final = bool(context.session) and info.get("final_in") == context.session
    if final or (context.world > 1 and ended):
        return  # Train starts the workers again after one of them raised
    try:
        run_trial(experiment, prepared, context)
    except NotFinite:
        pass
    except ConfigError as error:
        over = ("running", "interrupted", "failed")
        session = context.session or None
        close_from_outside(run_url(experiment), "failed", reason(error), over, final_in=session)
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if context.world == 1:
            return
        # The other ranks wait in a collective: only this one's death lets Train end them.
        how_much = probes.out_of_memory(context.device, error, context.vram_gib)
        oom = {"step": None, "rank": context.rank, **how_much}
        close_from_outside(run_url(experiment), "out_of_memory", OUT_OF_MEMORY, oom=oom)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Also where not torch's own allocator met it: a neighbour on the GPU may have the rest."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(w in str(error) for w in words)


def run_trial(experiment: Experiment, prepared: Prepared, context: Context) -> dict[str, Any]:
    """Train, or go on from the last checkpoint, and leave everything in the run's folder; returns
    the last metrics.

    Raises what ends a run early, after run.json says so.
    """
    choices = choose(experiment, context.device, context.world)
    set_numerics(choices, context)
    url = run_url(experiment)
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment).to(context.device)
    optimizer = build_optimizer(experiment, model)
    loss = build_loss(experiment).to(context.device)
    context.start.mark("model")
    run = Run(url, experiment, data_hash(experiment)) if context.rank == 0 else None
    saved = checkpoint.load(url)  # on the CPU: a second copy in VRAM would count as the trial's own
    clock = probes.Clock(context.device, warm_up_steps=choices.warm_up_steps)
    state = State()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sums = {name: value.to(context.device) for name, value in saved["sums"].items()}
        state = State(saved["step"], sums, saved["count"])
        loss.restore(saved["loss"])
        clock.restore(saved["clock"])
    population = pbt.apply(url, state.step, experiment, model, optimizer, loss)
    in_vain = died_in_vain(read_info(url), context.session, state.step)
    if context.world > 1:
        ranks.agree_on_start(state.step, url)
    if in_vain:
        why = f"its process died {MAX_DEATHS} times after step {state.step}; the same command "
        close_from_outside(url, "failed", why + "tries again")
        return {}
    if run is not None:
        run.begin(state.step, context.session, **population)
    context.start.mark("record")
    session = _Session(
        experiment, prepared, context, url, run, model, loss, optimizer, clock, choices
    )
    try:
        if saved is None:
            observe_inputs(experiment, prepared, model, context.device)
        guarded = (saved or {}).get("guards")
        del saved
        session.begin(state, guarded)
        session.replay()
        state = session.train(state)
    except BaseException as error:
        session.ended_by(error)
        raise
    session.end(state)
    return session.book.latest


class _Session:
    """The callbacks that `fit` gets: what they share."""

    def __init__(
        self, experiment, prepared, context, url, run, model, loss, optimizer, clock, choices
    ):
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
        self.choices: Choices = choices
        self.evaluator = Evaluator(experiment, prepared, context, url)
        context.start.mark("validation")
        self.book = Logbook(experiment, context, url, run, clock)
        self.state = State()
        self.stop_reason = ""

    # --- beginning and end ---

    def begin(self, state: State, guarded: dict[str, str] | None) -> None:
        """guarded: what the checkpoint has of the guards; None in one of older versions."""
        self.state = state
        self.book.recall(state.step, guarded)
        for _, metrics in self.book.earlier:
            self._observe(metrics)
        baseline = self.evaluator.baseline()
        self.context.start.mark("baseline")
        watched = getattr(self.schedule, "metric", None)
        if watched and watched not in means(baseline):
            text = f"'{watched}' has no value on these validation items; there is "
            raise ConfigError("schedule", [("metric", text + ", ".join(means(baseline)))])
        if self.run is not None:
            if state.step:
                kept = checkpoint.best_step(self.url)
                self.book.choose_from(state.step if kept is None else min(kept, state.step))
                checkpoint.settle_best(self.url, self.book.best, self.book.metric, state.step)
            folder = storage.join(self.experiment.runtime.results, self.experiment.name)
            self.evaluator.write_listing(folder)
        self._tell_start()
        self.book.begin(
            state.step,
            baseline,
            parameters=num_parameters(self.model),
            optimizer_groups=describe_groups(self.optimizer),
            choices=self.choices.record(),
            manifest_hash=self.prepared.manifest.hash,
            validation=self.evaluator.hash,
            validation_items=self.evaluator.num_items,
        )

    def _tell_start(self) -> None:
        """In the attempt's record, which goes out with the next facts."""
        if self.run is not None:
            self.run.info["attempts"][-1] |= self.context.start.record()

    def replay(self) -> None:
        """Tell the scheduler what an earlier try had reached, so that its rungs stand."""
        for step, metrics in self.book.earlier:
            self.context.report(step, {**metrics, "replayed": True})

    def end(self, state: State) -> None:
        if state.step >= self.experiment.train.steps:
            self.book.finish("finished", state.step, None)
        else:
            self.book.finish("interrupted", state.step, self.stop_reason)

    def ended_by(self, error: BaseException) -> None:
        """Say in run.json how it ended. SystemExit is Tune's way of stopping a trial."""
        if self.run is None or isinstance(error, Superseded):
            return
        # A full disk is the likeliest cause: then even this cannot be written, and the first error
        # counts.
        with contextlib.suppress(OSError):
            self._say_why(error)

    def _say_why(self, error: BaseException) -> None:
        assert self.run is not None
        finish = self.book.finish
        if isinstance(error, NotFinite):
            self.book.diverged(error, self.prepared)
            finish("diverged", error.step, str(error))
        elif is_out_of_memory(error):
            how_much = probes.out_of_memory(self.context.device, error, self.context.vram_gib)
            finish("out_of_memory", None, OUT_OF_MEMORY, oom={"step": self.state.step, **how_much})
        elif isinstance(error, SystemExit):
            # Tune also ends a trial that has reached its last step.
            if self.run.info["state"] != "finished":
                finish("stopped", self.book.latest.get("step"), PRUNED)
        elif isinstance(error, KeyboardInterrupt):
            finish("interrupted", None, CTRL_C)
        else:
            finish("failed", None, reason(error))

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
            transfer.ahead(self._feed(state.step), context.device),
            stall_seconds=experiment.runtime.stall_seconds,
            on_stall=self._on_stall,
            stop=context.stop if context.world == 1 else lambda: "",
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
                schedule=self._scale,
                device=context.device,
                bf16=self.choices.bf16,
                compile=self.choices.compile,
                graph=self.choices.cuda_graphs,
                said=self.book.goes_without,
                grad_clip=train.grad_clip,
                seed=train.seed,
                rank=context.rank,
                clock=self.clock,
                full_scale=self.evaluator.task.full_scale,
                improved=lambda _: self.book.best_is_latest,
                **self._among_ranks(),
            )

    def _among_ranks(self) -> dict[str, Any]:
        context = self.context
        ask, options = context.stop, {}
        if context.world > 1:
            every = self.experiment.runtime.log_every
            ask = ranks.stop_together(context.stop, every, context.device)
            options = {"average": ranks.average, "earliest": ranks.least}
            options["together"] = ranks.together

        def stop() -> str:
            self.context.start.mark("first_step")
            self.stop_reason = ask()
            return self.stop_reason

        return {"stop": stop, **options}

    def _scale(self, step: int, steps: int) -> float:
        self.context.start.first_batch()
        return self.schedule.scale(step, steps)

    def _wrapped(self) -> nn.Module:
        model: Any = self.model
        if self.context.world > 1:
            devices = [self.context.device] if self.context.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True
            )
        return model

    def _feed(self, start: int) -> Iterator[data.Batch]:
        recipe = build_recipe(self.experiment, self.prepared)
        stop, context = self.experiment.train.steps, self.context
        kept = context.feed.cache or feed_cache(self.experiment.runtime)
        cache = UnitCache(kept, recipe, context.rank, context.world) if kept else None
        self.book.feed_cache = cache
        if context.feed.kind == "process":
            return feed.in_process(recipe, start, stop, context.rank, context.world, cache=cache)
        return feed.on_ray(
            recipe,
            start,
            stop,
            context.rank,
            context.world,
            workers=self.experiment.runtime.data_workers,
            cpus=context.feed.cpus,
            resources=context.feed.resources,
            cache=cache,
        )

    def _on_stall(self, seconds: float) -> None:
        why = why_stalled(self.context, self.prepared.url)
        self.book.warn(f"no batch for {seconds:.0f} s: {why}")

    def _report(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._tell_start()
        if kind == "train":
            self.book.train_line(step, values)
        elif kind == "validation":
            self.book.validation_line(step, values, self.evaluator.heard)
            self._observe(self.book.latest)
        else:
            if step >= self.experiment.train.steps:
                self.book.finish("finished", step, None)
            else:
                self.book.so_far(step)
            self.context.report(step, {**self.book.latest, "step": step})

    def _observe(self, metrics: dict[str, Any]) -> None:
        """Of an evaluation, this try's or an earlier one's."""
        if hasattr(self.schedule, "observe"):
            scores = self.evaluator.task.scores
            metric = self.schedule.metric or next(iter(scores))
            self.schedule.observe(metrics.get(metric, math.nan), scores[metric])

    def _save(self, state: State) -> None:
        if self.run is None:
            return
        self.run.flush()
        best = self.book.best
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
                "guards": self.book.guarded,
            },
            f"{self.book.metric}={best[1]!r}" if best and best[0] == state.step else "",
        )

    # --- validation ---

    def _evaluate(self, _: nn.Module, step: int) -> dict[str, float]:
        if self.context.world > 1:
            ranks.share_buffers(self.model)
        self.model.eval()
        choices = self.choices

        def estimate(inputs: Tensor) -> Tensor:
            return estimated(self.model, inputs, bf16=choices.bf16, compiled=choices.compile)

        scores = self.evaluator.scores(estimate, f"step-{step:06d}")
        self.book.items_line(step, scores)
        return means(scores)
