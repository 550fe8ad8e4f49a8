"""What an experiment and a sweep are: YAML to frozen, validated objects; every problem with its
path; the id."""

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from bgray.problems import STRICT, ConfigError, Problem, names, unknown, validate, wrong
from bgray.sweep_config import SWEEP_KEYS


@dataclass(frozen=True, config=STRICT)
class Pick:
    """One entry of a table by its name, with every option filled in from the entry's signature."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Data:
    path: str = "builtin"
    """Folder or s3:// prefix written by `python -m bgray.shards`; `builtin` renders built-in music
    on first use."""
    sample_rate: int = Field(default=48000, ge=1)
    """Hz (of piano rolls: steps per beat). Prepared shards must have exactly this rate: nothing is
    resampled silently."""
    channels: int = Field(default=1, ge=1, le=128)
    segment: int = Field(default=32768, ge=1, le=2**26)
    """Samples per training example."""
    augment: tuple[Pick, ...] = ()
    """Transforms drawn per example and applied alike to input and target."""
    row_groups_per_unit: int = Field(default=2, ge=1)
    """Chunks decoded together: a work unit reads this many row groups of about 8 chunks (10 s
    each)."""
    batches_per_unit: int = Field(default=8, ge=1)
    """Batches cut from one work unit; more is cheaper on the CPU, fewer mixes more songs per
    batch."""
    builtin_songs: int = Field(default=48, ge=2)
    builtin_seconds: float = Field(default=20.0, gt=0)
    """Length of one built-in song."""


@dataclass(frozen=True, config=STRICT)
class Train:
    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Examples per step over all workers together (the global batch)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds the weights and the stream of examples: two trials with one seed see the same data at
    the same step."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """tf32 changes matrix products on a GPU only; bf16 is autocast with float32 weights and
    losses. auto: bf16 on a GPU that is made for it, tf32 anywhere else; run.json says which."""
    grad_clip: float | None = Field(default=1000.0, gt=0)
    """Largest global gradient norm. 1000, as the logs used, in effect only logs it. null: not even
    that."""


@dataclass(frozen=True, config=STRICT)
class Validation:
    every: int = Field(default=1000, ge=1)
    """Steps between evaluations; these are also ASHA's possible rungs."""
    segment: int | None = Field(default=None, ge=1, le=2**28)
    """Samples of each centre crop; null: four training segments, as the logs had it."""
    items: int = Field(default=64, ge=1)
    """At most this many chunks, spread evenly over the validation split. Every one of them is
    scored."""
    clips: int = Field(default=4, ge=0)
    """How many of them are written as audio at each evaluation (the listening set)."""


@dataclass(frozen=True, config=STRICT)
class FeedCache:
    """Finished work units, kept on a disk of the machine that trains."""

    path: str
    """A local folder, on NVMe best; several machines each have their own there."""
    gib: float = Field(gt=0)
    """Most that it may hold."""


@dataclass(frozen=True, config=STRICT)
class Runtime:
    """Where and how it runs; not part of the id, for it changes rounding at most.

    With one exception: what is taken over a batch, several workers take over each one's part of it.
    That is batch norm (open_unmix, roll_autoencoder, roll_rnn's bridges), and of the losses mrstft,
    dice, si_sdr and spectrogram's `version: original`; dropout and latent noise are drawn anew.
    Keep `workers` the same within a sweep that trains with one of them.
    """

    results: str = "results"
    """Folder or s3:// prefix; a run writes to <results>/<name>/<id>/."""
    cache: str = "data"
    """Where built-in music is rendered to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = Field(default=1, ge=1)
    """Training workers of one trial (DDP when more than one)."""
    gpus: float = Field(default=1.0, gt=0)
    """GPUs per training worker, where there are any; below 1 trials share one."""
    vram: Literal["whole", "auto"] | float = "whole"
    """GPU memory per trial, for trials of one worker. whole: as runtime.gpus says, one GPU each by
    default. auto: a probe measures what each kind of trial holds, and they share GPUs as far as
    that fits. A number: GiB each, the CUDA context (about half a GiB) included. Each keeps to its
    limit; one that runs out of memory beside others is tried once more alone. Their speeds are no
    figures to compare."""
    cpus: float | None = Field(default=None, gt=0)
    """CPUs per training worker; null: as many as fit, leaving some to Ray Data."""
    concurrency: int | None = Field(default=None, ge=1)
    """Trials at a time; null: as many as the machine holds."""
    threads: int | None = Field(default=None, ge=1)
    """torch threads per worker on the CPU; null: the worker's share of the CPUs."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model (its real-valued core). auto: on a GPU, where the steps are enough to
    pay for it."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record a step's kernels once and replay them, so that the GPU does not wait for Python. auto:
    on a GPU, for trials of one worker."""
    depthwise: Literal["auto", "library"] = "auto"
    """Depthwise 1-d convolutions: the fastest way known for the device, or the library's."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping what is in it: a
    quarter of what that pass keeps, for about a quarter more time. Of the U-Nets."""
    feed: Literal["auto", "ray", "process"] = "auto"
    """Who makes batches: Ray Data tasks, a thread of this process, or whichever suits the
    machine."""
    feed_cache: FeedCache | Literal["auto", "none"] = "auto"
    """Work units that one trial has made, for the trials after it that see the same data. auto: in
    a sweep where some do, in <cache>/feed, with a part of the free disk."""
    data_nodes: Literal["auto", "cpu_worker", "any"] = "auto"
    """Machines of a cluster that make batches: those marked `cpu_worker`, any with CPUs to spare,
    or, with auto, the marked ones where there are such machines or the cluster can add them."""
    spot_patience_seconds: float = Field(default=120.0, gt=0)
    """After so long without spot capacity the same machines are asked for on demand."""
    data_workers: int | None = Field(default=None, ge=1)
    """Ray Data tasks at a time per trial; null: what the machine has left."""
    stall_seconds: float = Field(default=30.0, gt=0)
    """After this long without a batch the run says why; after 20 times this long it stops."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl; the GPU is synchronised only then."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: at every evaluation."""


@dataclass(frozen=True, config=STRICT)
class Experiment:
    task: Pick
    model: Pick
    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. +-]*$")
    """The folder under `runtime.results`; by default the YAML file's name."""
    data: Data = Field(default_factory=Data)
    loss: dict[str, Pick] = Field(default_factory=dict)
    """Table name to options; `weight` scales that part in the sum."""
    optim: Pick = Field(default_factory=lambda: Pick("muon"))
    schedule: Pick = Field(default_factory=lambda: Pick("constant"))
    train: Train = Field(default_factory=Train)
    validation: Validation = Field(default_factory=Validation)
    runtime: Runtime = Field(default_factory=Runtime)

    def resolved(self) -> dict[str, Any]:
        """Plain data with all defaults filled in, as written to experiment.yaml and read back by
        `parse`."""
        raw = json.loads(json.dumps(dataclasses.asdict(self)))
        for section in ("task", "model", "optim", "schedule"):
            raw[section] = {"name": raw[section]["name"], **raw[section]["options"]}
        raw["loss"] = {name: pick["options"] for name, pick in raw["loss"].items()}
        raw["data"]["augment"] = [
            {"name": p["name"], **p["options"]} for p in raw["data"]["augment"]
        ]
        return raw

    def identity(self, data_hash: str) -> str:
        """Twelve hex digits: the resolved config without `runtime` and `name`, with the data's
        content hash.

        The data's path is left out: moved or mirrored data is the same data.
        """
        return digest(self._what_is_computed(data_hash))[:12]

    def variant_identity(self, data_hash: str) -> str:
        """As `identity`, the same for all seeds."""
        raw = self._what_is_computed(data_hash)
        raw["train"].pop("seed")
        return digest(raw)[:12]

    def _what_is_computed(self, data_hash: str) -> dict[str, Any]:
        raw = {
            key: value for key, value in self.resolved().items() if key not in ("runtime", "name")
        }
        raw["data"] = {**raw["data"], "path": data_hash}
        for key in ("builtin_songs", "builtin_seconds"):  # of built-in music, in `data_hash` then
            raw["data"].pop(key)
        raw["validation"].pop("clips")  # what is written, not what is computed
        if self.schedule.name not in LENGTH_MATTERS:
            raw["train"].pop("steps")
        return raw


LENGTH_MATTERS = frozenset({"wsd"})
"""Schedules whose rate depends on train.steps. With any other a longer run is the shorter one, gone
on, and has its id."""


Tables = Mapping[str, Mapping[str, Callable[..., Any]]]
"""Section (task, model, loss, optim, schedule, augment) to its table of callables."""

CONTEXT_ARGUMENTS = frozenset({"self", "model", "sample_rate", "num_sources", "channels_in"})
"""Arguments that the framework fills in; they are not options and cannot be written in YAML."""


def digest(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- checking


def parse(raw: dict[str, Any], tables: Tables, source: str) -> Experiment:
    """Check the whole experiment and fill in every default. ConfigError lists all problems found
    at once."""
    problems: list[Problem] = []
    raw = {key: value for key, value in raw.items() if key not in SWEEP_KEYS}
    for section in ("task", "model"):
        if raw.get(section) is None:
            problems.append(
                (
                    section,
                    f"missing; write {section}: {{name: ...}}, one of {names(tables[section])}",
                )
            )
            raw[section] = None

    def pick(table: str, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            problems.append(
                (path, f"expected {{name: ...}} with one of {names(tables[table])}, got {value!r}")
            )
            return {"name": "?"}
        name, options = value["name"], {k: v for k, v in value.items() if k != "name"}
        entry = tables[table].get(name)
        if entry is None:
            problems.append((f"{path}.name", unknown(name, tables[table])))
            return {"name": name}
        resolved, found = resolve_options(entry, options, path)
        problems.extend(found)
        return {"name": name, "options": resolved}

    task = task_entry(raw, tables["task"])
    if "loss" not in raw:
        raw["loss"] = dict(getattr(task, "default_loss", {}))
    if raw.get("data") is None:
        raw["data"] = {}
    if isinstance(raw["data"], dict):
        raw["data"] = {**getattr(task, "data_defaults", {}), **raw["data"]}
    for section, default in {
        "task": "",
        "model": "",
        "optim": "muon",
        "schedule": "constant",
    }.items():
        value = raw.pop(section, None)
        if value is None:
            value = {} if default else None
        if isinstance(value, dict) and default:
            value = {"name": default, **value}
        if value is not None:
            raw[section] = pick(section, value, section)
    raw["loss"] = _loss(raw.get("loss"), tables, problems)
    if isinstance(raw.get("data"), dict) and raw["data"].get("augment"):
        steps = raw["data"]["augment"]
        if isinstance(steps, list):
            steps = [pick("augment", step, f"data.augment[{i}]") for i, step in enumerate(steps)]
            raw["data"] = {**raw["data"], "augment": steps}
    missing = [section for section in ("task", "model") if section not in raw]
    experiment, found = validate(
        Experiment, {**raw, **{s: {"name": "?"} for s in missing}}, "", also=SWEEP_KEYS
    )
    problems.extend(found)
    if problems or experiment is None:
        raise ConfigError(
            source,
            sorted(
                set(problems),
                key=lambda p: (
                    list(raw).index(p[0].split(".")[0]) if p[0].split(".")[0] in raw else -1
                ),
            ),
        )
    return experiment


def task_entry(raw: dict[str, Any], tasks: Mapping[str, Callable[..., Any]]) -> Any:
    """The task's class that a raw experiment names, or None."""
    task = raw.get("task")
    return tasks.get(str(task.get("name") if isinstance(task, dict) else task))


def _loss(raw: Any, tables: Tables, problems: list[Problem]) -> dict[str, Any]:
    """`{l1: 10, mrstft: {weight: 1, n_bins: 64}}` -> picks; a bare number is the weight."""
    if not isinstance(raw, dict) or not raw:
        problems.append(
            (
                "loss",
                f"expected name: weight lines with names from {names(tables['loss'])}, got {raw!r}",
            )
        )
        return {}
    picks = {}
    for name, value in raw.items():
        entry = tables["loss"].get(name)
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if entry is None:
            problems.append((f"loss.{name}", unknown(str(name), tables["loss"])))
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            problems.append((f"loss.{name}", wrong("float", weight)))
            weight = 1.0
        elif not 0 < weight < math.inf:
            problems.append(
                (f"loss.{name}", f"a weight must be above 0 and finite, got {weight!r}")
            )
        resolved, found = resolve_options(entry, options, f"loss.{name}")
        problems.extend(found)
        picks[name] = {"name": name, "options": {"weight": float(weight), **resolved}}
    return picks


def resolve_options(entry: Callable[..., Any], options: Mapping[str, Any], path: str):
    """(all options with defaults filled in, problems) for a table's entry: its signature is the
    schema.

    `entry.check(**options)`, where there is one, adds what types cannot say (lists that do not fit
    together).
    """
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(entry).parameters.items():
        if name in CONTEXT_ARGUMENTS or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        required = parameter.default is inspect.Parameter.empty
        fields[name] = (parameter.annotation, ... if required else parameter.default)
    schema = pydantic.create_model(
        "Options", __config__=ConfigDict(extra="forbid", strict=True), **fields
    )
    checked, problems = validate(schema, dict(options), path)
    if checked is None:
        return {}, problems
    resolved = checked.model_dump()
    if check := getattr(entry, "check", None):
        problems = [(f"{path}.{name}", text) for name, text in check(**resolved)]
    return json.loads(json.dumps(resolved)), problems
