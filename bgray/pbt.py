"""Population based training: who copies whom, with which values, and how a run takes them on."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bgray import checkpoint, storage
from bgray.build import build_optimizer
from bgray.config import ConfigError, Experiment, Pick
from bgray.draws import Entry, entry, rounded
from bgray.losses import LossSum
from bgray.problems import Problem, unknown
from bgray.sweep_config import Sweep

FILE = "pbt.json"
"""In a member's folder: what it has trained with, from which step on, and whose weights those
were."""
OPTIONS = {
    "lr": {"lr"},
    "adamw_lr": {"lr"},
    "momentum": {"momentum", "beta"},
    "betas": {"betas"},
    "eps": {"eps"},
    "weight_decay": {"weight_decay"},
    "adamw_weight_decay": {"weight_decay"},
}
"""Options of optimizers that may change during a run, and their names in its parameter groups."""
FACTORS = (0.8, 1.2)
RESAMPLE = 0.25
"""A value is multiplied by one of the factors, or with this probability drawn anew (both as in the
paper's section 4.1.1 and Ray's implementation)."""

Values = dict[str, Any]
"""Dotted path to value."""


# --- what may be asked for


def problems(sweep: Sweep, space: Mapping[str, Entry], base: Experiment) -> list[Problem]:
    """Why this population cannot be trained, with the way out."""
    pbt = sweep.pbt
    assert pbt is not None
    found = []
    other = {
        "search": bool(sweep.search),
        "variants": bool(sweep.variants),
        "asha": sweep.asha is not None,
        "screening": sweep.screening is not None,
        "seeds": sweep.seeds > 1,
        "sampler": sweep.sampler != "random",
        "baseline": sweep.baseline is not None,
    }
    text = "does not go with pbt, whose members are no variants; leave one of the two out"
    found += [(key, text) for key, there in other.items() if there]
    if base.runtime.workers > 1:
        found.append(("runtime.workers", "must be 1 with pbt: a member is one worker"))
    if pbt.every % base.validation.every:
        text = f"{pbt.every} is not a multiple of validation.every = {base.validation.every}: "
        found.append(("pbt.every", text + "members are compared by a score at that step"))
    if pbt.every >= base.train.steps:
        text = f"{pbt.every} is not below train.steps = {base.train.steps}: nothing would be copied"
        found.append(("pbt.every", text))
    if pbt.every % (base.runtime.checkpoint_every or base.validation.every):
        text = f"{base.runtime.checkpoint_every} does not divide pbt.every = {pbt.every}: there "
        found.append(("runtime.checkpoint_every", text + "would be no checkpoint to copy"))
    if base.schedule.name == "plateau":
        text = "plateau lowers the rate by a member's own scores, which are not those of the "
        found.append(("schedule", text + "weights it copied; use constant or wsd"))
    for path, spec in space.items():
        if text := _refusal(path, spec, base):
            found.append((f"pbt.vary.{path}", text))
    return found


def _refusal(path: str, spec: Entry, base: Experiment) -> str:
    section, _, name = path.partition(".")
    if spec.kind not in ("uniform", "loguniform", "choice"):
        return f"expected uniform, loguniform or choice, got {spec.kind}"
    if section == "optim" and name in OPTIONS:
        there = [option for option in base.optim.options if option in OPTIONS]
        return "" if name in there else unknown(name, there, "option")
    if section == "loss":
        name = name.removesuffix(".weight")
        return "" if name in base.loss else unknown(name, base.loss, "loss")
    return (
        "cannot change during a run: the net, the data and what else is built once would have to "
        f"start anew. There is optim.{', optim.'.join(OPTIONS)} and loss.<name>"
    )


# --- values


def first(space: Mapping[str, Entry], sample_seed: int, member: int) -> Values:
    """What member `member` begins with."""
    rng = np.random.default_rng([sample_seed, member])
    return {path: spec.draw(rng) for path, spec in space.items()}


def changes(values: Values, base: Experiment) -> Values:
    """As overrides of the base: a weight is set beside its loss's other options."""
    found = {path: value for path, value in values.items() if path.startswith("optim.")}
    weights = {path: value for path, value in values.items() if path not in found}
    if weights:
        losses = {name: dict(pick.options) for name, pick in base.loss.items()}
        for path, value in weights.items():
            losses[path.removeprefix("loss.").removesuffix(".weight")]["weight"] = value
        found["loss"] = losses
    return found


def explore(space: Mapping[str, Entry], values: Values, rng: np.random.Generator) -> Values:
    """Others near by: each number times 0.8 or 1.2 within its range, each choice to a neighbour in
    its list; now and then drawn anew."""
    found = {}
    for path, spec in space.items():
        if rng.random() < RESAMPLE:
            found[path] = spec.draw(rng)
        elif spec.listed:
            place = spec.values.index(values[path]) + int(rng.choice([-1, 1]))
            found[path] = spec.values[min(max(place, 0), len(spec.values) - 1)]
        else:
            found[path] = spec.fitted(values[path] * float(rng.choice(FACTORS)))
    return found


# --- in the run


def apply(
    url: str,
    step: int,
    experiment: Experiment,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossSum,
) -> dict[str, Any]:
    """Give a run that goes on from its checkpoint of `step` the values it has from there on.

    The optimizer's state (moments) stays the checkpoint's, the options of its groups become those
    of one built afresh. Returns facts for run.json; none where the run is in no population.
    """
    if not (known := [entry for entry in _history(url) if entry["step"] <= step]):
        return {}
    now = known[-1]
    changed = dataclasses.replace(experiment, optim=Pick(experiment.optim.name, now["optim"]))
    names = set().union(*OPTIONS.values())
    fresh = build_optimizer(changed, model).param_groups
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: new[name] for name in names & new.keys()})
        group["initial_lr"] = new["lr"]  # what the schedule scales
    loss.weights.update(now["loss"])
    return {"pbt": [{key: entry[key] for key in ("step", "from", "values")} for entry in known]}


def _history(url: str) -> list[dict[str, Any]]:
    """As `Population._copy` wrote it; empty where the run is in no population."""
    path, folder = storage.join(url, FILE), url.rsplit("/", 1)[0]
    # Without the file the run would go on with the values it began with, and nobody would notice.
    way_out = f"move the population's folder {folder} away to start it afresh"
    if (found := storage.read_json(path, way_out)) is None:
        return []
    history = found.get("history")
    kinds = {"step": int, "values": dict, "optim": dict, "loss": dict}
    if not isinstance(history, list) or not all(
        isinstance(entry, dict)
        and "from" in entry
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        for entry in history
    ):
        raise ConfigError(path, [("", f"is damaged (no history of values); {way_out}")])
    return history


# --- in the driver


class Population:
    """Rounds of one population: all members reach a step, then the worst copy the best.

    Each round is written to the manifest before anything is copied, and copying twice is copying
    once: killed anywhere, the same command ends the same.

    members: run id to folder, in order. make: values to the checked experiment. written: `journal`
    of an earlier command. write: brings the journal to disk.
    """

    def __init__(
        self,
        sweep: Sweep,
        members: Mapping[str, str],
        base: Experiment,
        make: Callable[[Values], Experiment],
        written: dict[str, Any] | None,
        write: Callable[[], None],
    ):
        assert sweep.pbt is not None
        self.pbt, self.members = sweep.pbt, dict(members)
        self.last = base.train.steps
        self._sign = 1 if sweep.mode == "min" else -1
        self._seed, self._make, self._write = sweep.sample_seed, make, write
        self.space = {path: entry(spec) for path, spec in sweep.pbt.vary.items()}
        self.first = {
            run_id: first(self.space, sweep.sample_seed, i) for i, run_id in enumerate(members)
        }
        settings = dataclasses.asdict(sweep.pbt)
        self._settings = {**settings, "sample_seed": sweep.sample_seed, "members": list(members)}
        # A copy: what is on disk is compared with what is to be.
        self.rounds: list[dict[str, Any]] = copy.deepcopy((written or {}).get("rounds", []))
        if self.rounds and written and written["settings"] != self._settings:
            folder = next(iter(members.values())).rsplit("/", 1)[0]
            text = "holds a population that was begun with another base or other `pbt` keys; move "
            text += "that folder away, or give this one another `name`"
            raise ConfigError(folder, [("", text)])

    def allowed(self) -> int:
        """The step up to which every member may run."""
        done = [entry for entry in self.rounds if entry["done"]]
        return min(self.last, (done[-1]["step"] if done else 0) + self.pbt.every)

    def due(self) -> bool:
        """Whether there is a round to come, once all members have got as far as they may."""
        return self.allowed() < self.last

    def turn(self, scores: Mapping[str, float]) -> None:
        """Hold the next round.

        scores: of the members that are left, at `allowed`.
        """
        if not self.rounds or self.rounds[-1]["done"]:
            self.rounds.append(self._decide(scores))
            self._write()
        self._copy(self.rounds[-1])
        self.rounds[-1]["done"] = True
        self._write()

    def _decide(self, scores: Mapping[str, float]) -> dict[str, Any]:
        step, number = self.allowed(), len(self.rounds)
        ranked = self._ranked(scores)
        few = min(math.ceil(self.pbt.quantile * len(ranked)), len(ranked) // 2)
        copies = []
        for member in ranked[len(ranked) - few :]:
            place = list(self.members).index(member)
            rng = np.random.default_rng([self._seed, number, place])
            source = ranked[int(rng.integers(few))]
            values = explore(self.space, self.values(source), rng)
            copies.append({"to": member, "from": source, "values": values})
        known = {m: rounded(s) if math.isfinite(s) else None for m, s in scores.items()}
        return {"step": step, "scores": known, "copies": copies, "done": False}

    def _ranked(self, scores: Mapping[str, float]) -> list[str]:
        """Best first; of equals the earlier member; without a score last."""

        def key(member: str) -> float:
            score = self._sign * scores[member]
            return score if math.isfinite(score) else math.inf

        return sorted((member for member in self.members if member in scores), key=key)

    def values(self, member: str) -> Values:
        """What a member trains with now."""
        return self.history(member)[-1]["values"]

    def history(self, member: str) -> list[dict[str, Any]]:
        """{"step", "from", "values"} of each change of a member, the first one at step 0."""
        found = [{"step": 0, "from": None, "values": self.first[member]}]
        for held in self.rounds:
            for copied in held["copies"]:
                if copied["to"] == member:
                    found.append({"step": held["step"], **copied})
        return [{key: item[key] for key in ("step", "from", "values")} for item in found]

    def _copy(self, held: dict[str, Any]) -> None:
        for copied in held["copies"]:
            to, source = (self.members[copied[key]] for key in ("to", "from"))
            history = [self._in_full(item) for item in self.history(copied["to"])]
            text = json.dumps({"history": history}, indent=1) + "\n"
            storage.write_bytes(storage.join(to, FILE), text.encode())
            checkpoint.adopt(to, source, held["step"])

    def _in_full(self, item: dict[str, Any]) -> dict[str, Any]:
        """With all options of the optimizer and all weights, so that the run need not resolve
        them."""
        experiment = self._make(item["values"])
        weights = {name: pick.options["weight"] for name, pick in experiment.loss.items()}
        return {**item, "optim": experiment.optim.options, "loss": weights}

    # --- what has come of it

    def journal(self, finals: Mapping[str, float]) -> dict[str, Any]:
        """For the manifest. finals: scores of the members that are at the last step."""
        held = copy.deepcopy(self.rounds)  # of then: these will be changed
        found: dict[str, Any] = {"settings": self._settings, "rounds": held}
        if finals:
            winner = self._ranked(finals)[0]
            found["found"] = {"winner": winner, "schedule": self.schedule(winner)}
        return found

    def schedule(self, winner: str) -> list[dict[str, Any]]:
        """{"step", "member", "values"}: with what the weights that the winner has now were trained,
        from which step on, and by whom."""
        found, member = [], winner
        for held in reversed(self.rounds):
            for copied in held["copies"]:
                if copied["to"] == member:
                    values = {"member": member, "values": copied["values"]}
                    found.append({"step": held["step"], **values})
                    member = copied["from"]
                    break
        found.append({"step": 0, "member": member, "values": self.first[member]})
        return found[::-1]

    def text(self, finals: Mapping[str, float], titles: Mapping[str, str]) -> str:
        """The schedule that was found, for people. titles: of the members, by run id."""
        if not finals:
            return ""
        winner = self._ranked(finals)[0]
        lines = [f"The schedule that {titles[winner]} came by:"]
        for item in self.schedule(winner):
            values = ", ".join(f"{path} {value}" for path, value in item["values"].items())
            lines.append(f"  from step {item['step']}: {values} ({titles[item['member']]})")
        text = f"The best of {len(self.members)} members looks better than it is: it was chosen by "
        lines.append(text + "the very score it is shown with.")
        return "\n".join(lines)


def scores_of(known: Mapping[str, Any], step: int) -> dict[str, float]:
    """Score at `step` of each member that is there, from agenda.Known by run id."""
    return {
        run_id: run.scores.get(step, math.nan) for run_id, run in known.items() if run.step >= step
    }
