"""What a sweep is besides its base experiment: what varies, how often, what it may cost."""

import dataclasses
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bgray import trackers
from bgray.problems import STRICT, ConfigError, validate


@dataclass(frozen=True, config=STRICT)
class Asha:
    """Asynchronous successive halving of variants (Li et al. 2020, arXiv:1810.05934, algorithm 2),
    judged over all their seeds; time is counted in steps."""

    grace_steps: int = Field(ge=1)
    """No trial is stopped before this step."""
    reduction_factor: int = Field(default=3, ge=2)
    """About one variant in this many goes on at each rung."""
    controls: float = Field(default=0.1, ge=0, le=1)
    """Share of the variants that always run to the end: they tell how far the rungs can be
    trusted."""


@dataclass(frozen=True, config=STRICT)
class Screening:
    """First one seed of every variant, then fresh seeds of the baseline and the most promising
    ones: whoever was lucky in the first round is found out in the second."""

    shortlist: int = Field(default=3, ge=1)
    """Variants that get fresh seeds, besides the baseline."""
    seeds: int = Field(default=3, ge=2)
    """Fresh seeds of each of them."""


@dataclass(frozen=True, config=STRICT)
class Budget:
    gpu_hours: float = Field(gt=0)
    """GPUs x hours that all trials together may take, earlier commands' included; where there is
    no GPU, trials x hours. What does not fit is not started, what is running stops with a
    checkpoint: a larger budget goes on from there."""


@dataclass(frozen=True, config=STRICT)
class Pbt:
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846): runs of the base side by
    side; now and then the worst go on from the best ones' weights, with their values changed a
    little. What is found is a schedule of the values, not a setting."""

    every: int = Field(ge=1)
    """Steps between exchanges; a multiple of validation.every."""
    vary: dict[str, dict[str, Any]] = Field(min_length=1)
    """optim.<option> or loss.<name> to one of {uniform|loguniform: [low, high]}, {choice: [...]}:
    what each member begins with is drawn from it, and no change leaves it."""
    population: int = Field(default=4, ge=2, le=1000)
    """Members, with train.seed, train.seed + 1, ..."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the population that is replaced at each exchange (one at least), and the share it is
    replaced from."""


@dataclass(frozen=True, config=STRICT)
class Sweep:
    """A base experiment and what varies: every combination of `search`, for each of `variants`."""

    base: dict[str, Any]
    """The raw experiment; each trial is this with its own overrides applied."""
    search: dict[str, dict[str, Any] | list[Any]] = Field(default_factory=dict)
    """Dotted path to a list (grid), or to one of {grid|choice: [...]},
    {uniform|loguniform|randint: [low, high]}."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name to {dotted path: value}; an empty block is the base itself."""
    samples: int = Field(default=8, ge=1)
    """How many draws, where the search has random entries."""
    sample_seed: int = Field(default=0, ge=0)
    sampler: Literal["random", "tpe"] = "random"
    """tpe: `samples` draws one after another, each chosen by Optuna from what the earlier ones came
    to, besides the base itself; lists are choices then, not a grid."""
    seeds: int = Field(default=1, ge=1, le=1000)
    """Trials of each variant, with train.seed, train.seed + 1, ...; one is an anecdote."""
    baseline: str | None = None
    """What the others are compared with: a variant's label as --dry prints it; null: the first."""
    asha: Asha | None = None
    """null: every trial runs to its end."""
    screening: Screening | None = None
    """null: every variant gets all `seeds`."""
    pbt: Pbt | None = None
    """Instead of a search: members that copy from each other."""
    budget: Budget | None = None
    """null: until all is done."""
    metric: str = "auto"
    """What trials are compared by; auto: the first of the task's scores."""
    mode: Literal["min", "max", "auto"] = "auto"
    """Which way is better; auto: as the task has it for that score."""
    trackers: list[str] | dict[str, dict[str, Any] | None] = Field(default_factory=list)
    """Who is told besides TensorBoard: [mlflow, wandb, aim], or each with options, such as
    {mlflow: {tracking_uri: ...}}. The package must be installed; secrets stay in the
    environment."""


SWEEP_KEYS = frozenset(f.name for f in dataclasses.fields(Sweep)) - {"base"}


def split_sweep(raw: dict[str, Any], source: str) -> Sweep:
    """The sweep's own keys apart from the base experiment's; a file without any is a sweep of
    one."""
    own = {key: raw[key] for key in raw if key in SWEEP_KEYS}
    base = {key: raw[key] for key in raw if key not in SWEEP_KEYS}
    sweep, problems = validate(Sweep, {**own, "base": base}, "")
    if sweep is not None:
        problems = trackers.problems(sweep.trackers)
    if sweep is None or problems:
        raise ConfigError(source, problems)
    return sweep
