"""Other trackers of experiments (MLflow, W&B, Aim), as a sweep's `trackers:` names them.

Tune has a callback for each; ours tell them what varies and our validation scores, by our steps.
None of them is a dependency.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bgray.problems import ConfigError, Problem, unknown


@dataclass(frozen=True)
class Tracker:
    """Where Tune's callback is, and which of its options one may set."""

    package: str
    callback: str
    options: Mapping[str, tuple[type, ...]]
    """What each may be; null as well, for the callback's own default."""
    secret: str
    """The environment variable, or what to do instead, for what must not be in a file."""


TEXT, LIST, BLOCK, SWITCH, NUMBER = (str,), (list,), (dict,), (bool,), (int, float)
WORDS = {TEXT: "text", LIST: "a list", BLOCK: "a block of names and values"}
WORDS |= {SWITCH: "true or false", NUMBER: "a number"}
TRACKERS = {
    "mlflow": Tracker(
        "mlflow",
        "ray.air.integrations.mlflow.MLflowLoggerCallback",
        {
            **dict.fromkeys(("tracking_uri", "registry_uri", "experiment_name"), TEXT),
            "tags": BLOCK,
            "save_artifact": SWITCH,
        },
        "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
    "wandb": Tracker(
        "wandb",
        "ray.air.integrations.wandb.WandbLoggerCallback",
        {
            **dict.fromkeys(("project", "entity", "group", "notes", "job_type"), TEXT),
            **dict.fromkeys(("mode", "dir"), TEXT),
            **dict.fromkeys(("tags", "excludes"), LIST),
        },
        "WANDB_API_KEY (or run `wandb login` once)",
    ),
    "aim": Tracker(
        "aim",
        "ray.tune.logger.aim.AimLoggerCallback",
        {
            **dict.fromkeys(("repo", "experiment_name"), TEXT),
            "metrics": LIST,
            "log_system_params": SWITCH,
            "system_tracking_interval": NUMBER,
        },
        "it in the environment, as Aim's documentation says",
    ),
}
# Keyboards and tokenizers are none.
SECRET = re.compile(r"key(?!board)|token(?!i[sz])|secret|passw|credential", re.IGNORECASE)
USER_IN_URL = re.compile(r"://[^/@\s]+@")
PART_OF_URL = re.compile(r"://[^?#\s]*[?#](\S*)")
IN_URL = re.compile(
    rf"(?:^|[&;])[^=&;]*(?:{SECRET.pattern}|auth|signature|pwd)[^=&;]*=", re.IGNORECASE
)
"""Of what follows a URL's `?` or `#`."""

Wanted = Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None


def named(wanted: Wanted) -> dict[str, dict[str, Any]]:
    """Options by tracker, of a list of names or a block with options."""
    if isinstance(wanted, Mapping):
        return {name: dict(options or {}) for name, options in wanted.items()}
    return {name: {} for name in wanted or ()}


def problems(wanted: Wanted) -> list[Problem]:
    """What is wrong with `trackers:`, without a look at what is installed: a cluster may have
    it."""
    found = []
    for name, options in named(wanted).items():
        path = f"trackers.{name}"
        if (tracker := TRACKERS.get(name)) is None:
            found.append((path, unknown(name, TRACKERS, "tracker")))
            continue
        for option, value in options.items():
            where = f"{path}.{option}"
            if hidden := list(_secrets(option, value, where, tracker.secret)):
                found += hidden
            elif option not in tracker.options:
                found.append((where, unknown(option, tracker.options, "option")))
            elif text := _wrong_type(value, tracker.options[option]):
                found.append((where, text))
    return found


def _secrets(name: str, value: Any, where: str, instead: str) -> Iterator[Problem]:
    """What must not be kept, however deep in an option; never repeated."""
    if SECRET.search(name):
        yield where, f"a secret has no place in a file that is kept; set {instead}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(str(key), item, f"{where}.{key}", instead)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _secrets("", item, f"{where}[{i}]", instead)
    elif isinstance(value, str):
        if USER_IN_URL.search(value):
            yield where, f"has a user or password in it, which is kept; set {instead}"
        elif any(IN_URL.search(part) for part in PART_OF_URL.findall(value)):
            yield where, f"has a secret in its address, which is kept; set {instead}"


def _wrong_type(value: Any, kinds: tuple[type, ...]) -> str:
    """What is wrong with it, or empty."""
    if value is None or (isinstance(value, kinds) and (bool in kinds) == isinstance(value, bool)):
        return ""
    got = "a list" if isinstance(value, list) else "a block"
    got = repr(value)[:40] if isinstance(value, str | int | float) else got
    return f"expected {WORDS[kinds]}, got {got}"


def refuse_missing(wanted: Wanted, source: str) -> None:
    """ConfigError where a tracker's package is not installed here."""
    found = []
    for name in named(wanted):
        package = TRACKERS[name].package
        try:
            there = importlib.util.find_spec(package) is not None
        except ValueError:  # loaded, but nobody says from where
            there = True
        if not there:
            text = f"is not installed: uv pip install {package} (or pip install {package})"
            found.append((f"trackers.{name}", text))
    if found:
        raise ConfigError(source, found)


def callbacks(
    wanted: Wanted,
    title: str,
    describe: Callable[[str], tuple[str, dict[str, Any]]],
    scores: Sequence[str],
    say: Callable[[str], None] = print,
) -> list[Any]:
    """Tune's callbacks, set up. ConfigError where one cannot be (no key, no server).

    title: the sweep's name, for those that group runs by one. describe: run id -> (name, what
    varies).
    """
    made = []
    for name, options in named(wanted).items():
        module, _, kind = TRACKERS[name].callback.rpartition(".")
        usual = {"group" if name == "wandb" else "experiment_name": title}
        usual |= {"project": "bgray"} if name == "wandb" else {}
        cls = _telling(getattr(importlib.import_module(module), kind), name, describe, scores, say)
        try:
            callback = cls(**{**usual, **options})
            callback.begin()
        except Exception as error:  # each has exceptions of its own
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError("trackers", [(name, f"does not start: {why[:300]}")]) from None
        made.append(callback)
    return made


class Named:
    """A Tune trial under its name in the sweep, with what varies in the place of our ids."""

    def __init__(self, trial: Any, name: str, values: dict[str, Any]):
        self._trial, self._name = trial, name
        self.config = self.evaluated_params = values
        self.seen = 0
        """The last step told; after a restart earlier ones come again."""

    def __str__(self) -> str:
        return self._name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)


def _telling(
    base: type,
    name: str,
    describe: Callable[[str], tuple[str, dict[str, Any]]],
    scores: Sequence[str],
    say: Callable[[str], None],
) -> Any:
    """`base` with real values and steps, and without the power to end a sweep."""
    from ray.tune import Callback

    class Telling(base):
        def begin(self) -> None:
            super().setup()
            self._named: dict[str, Named] = {}
            self._warned = False

        def setup(self, *args: Any, **info: Any) -> None:
            pass  # done

        def log_trial_start(self, trial: Any) -> None:
            self._try(super().log_trial_start, self._of(trial))

        def log_trial_result(self, iteration: int, trial: Any, result: dict) -> None:
            known, step = self._of(trial), result.get("step", 0)
            if step <= known.seen:
                return
            known.seen = step
            # The step goes where each of them looks for one.
            told = {score: result[score] for score in scores if score in result}
            told["training_iteration"] = step
            self._try(super().log_trial_result, iteration, known, told)

        def log_trial_end(self, trial: Any, failed: bool = False) -> None:
            known = self._of(trial)
            self._named.pop(trial.trial_id)
            self._try(super().log_trial_end, known, failed)

        def _of(self, trial: Any) -> Named:
            if trial.trial_id not in self._named:
                self._named[trial.trial_id] = Named(trial, *describe(trial.config["trial"]))
            return self._named[trial.trial_id]

        def _try(self, tell: Callable[..., None], *what: Any) -> None:
            try:
                tell(*what)
            except Exception as error:  # a tracker that is away is no reason to stop training
                if not self._warned:
                    self._warned = True
                    say(f"{name} does not get everything ({type(error).__name__}: {error})")

        def __reduce__(self) -> Any:  # Tune keeps copies on disk, which nobody reads
            return Callback, ()

    return Telling
