"""What varies in a sweep: by dotted path, as each of its trials has it."""

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bgray.search import Trial
    from bgray.sweep_config import Sweep


class Varying:
    """Of a sweep whose variants may become more. Each is resolved once, however many trials start:
    that takes longer than all the rest. For any thread."""

    def __init__(self, sweep: "Sweep", variants: "Mapping[str, Trial]"):
        self._search, self._variants = sweep.search, variants
        self._named = [*sweep.search, *(sweep.pbt.vary if sweep.pbt else ())]
        self._named += [path for block in sweep.variants.values() for path in block]
        self._settings: dict[str, dict[str, Any]] = {}
        """Variant id to what it has of all that may vary."""
        self._found: dict[str, set[str]] = {}
        """Path to the values that there are, as JSON; none is as good as null."""
        self._lock = threading.Lock()

    def values(self, trial: "Trial") -> dict[str, Any]:
        """What varies as this trial has it, or the sweep will draw; and its label and seed."""
        with self._lock:
            self._take_in([*self.variants(), trial])
            settings = self._settings[trial.variant]
            varying = {path: settings[path] for path in self._paths() if path in settings}
        return {"variant": trial.label, "seed": trial.seed, **varying}

    def variants(self) -> "list[Trial]":
        """One trial of each variant that there is now."""
        return list(self._variants.values())

    def _paths(self) -> list[str]:
        return [p for p, found in self._found.items() if len(found) > 1 or p in self._search]

    def _take_in(self, trials: "list[Trial]") -> None:
        """Those of them whose variants are new."""
        for trial in trials:
            if trial.variant in self._settings:
                continue
            flat = _flat(trial.experiment.resolved())
            settings = {path: value for path, value in flat.items() if self._may_vary(path)}
            for path in dict.fromkeys([*self._found, *settings]):
                found = self._found.setdefault(path, {"null"} if self._settings else set())
                found.add(json.dumps(settings.get(path)))
            self._settings[trial.variant] = settings

    def _may_vary(self, path: str) -> bool:
        within = any(f"{path}.".startswith(f"{name}.") for name in self._named)
        return within and path != "train.seed"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as {dotted path: leaf}; a loss that is nothing but its weight is that weight,
    as one writes it."""
    if not isinstance(value, Mapping):
        return {path: value}
    if path.startswith("loss.") and set(value) == {"weight"}:
        return {path: value["weight"]}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found
