import json
import random

import pytest
import yaml

from bgray import storage
from bgray.agenda import Agenda
from bgray.screening import affordable
from bgray.search import expand

STEPS, EVERY = 16, 4
SCORES = {"base": 5.0, "good": 3.0, "fair": 4.0, "poor": 6.0, "bad": 7.0}


def write_sweep(tmp_path, tiny, **keys):
    names = keys.pop("names", SCORES)
    variants = {name: {"optim.weight_decay": 0.001 * i} for i, name in enumerate(names)}
    raw = {
        **tiny,
        "optim": {"name": "adamw", "lr": 1e-3},
        "train": {**tiny["train"], "steps": STEPS},
        "validation": {**tiny["validation"], "every": EVERY},
        "variants": variants,
        **keys,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


class Pretender:
    """Trains by writing down what a training would have left."""

    def __init__(self, agenda, scores=SCORES, hours=1.0, fate=None):
        self.agenda, self.scores, self.hours = agenda, scores, hours
        self.fate = fate or {}
        """(label, seed): {step: state} of those that end early."""
        self.started = []

    def value(self, trial, step):
        return self.scores[trial.label] + 0.1 * trial.seed + 10 / step

    def write(self, trial, step, state, **facts):
        lines = storage.join(trial.url, "metrics.jsonl")
        done = range(EVERY, step + 1, EVERY)
        metric = self.agenda.sweep.metric
        values = [{"step": s, "val": {metric: self.value(trial, s)}} for s in done]
        storage.write_bytes(lines, "".join(json.dumps(v) + "\n" for v in values).encode())
        timing = {"train_seconds": 3600 * self.hours * step / STEPS}
        metrics = {"step": step, metric: self.value(trial, step)} if step else {}
        info = {"state": state, "step": step, "seed": trial.seed, "timing": timing, **facts}
        info["metrics"] = metrics
        storage.write_bytes(storage.join(trial.url, "run.json"), json.dumps(info).encode())

    def run(self, trial):
        self.started.append((trial.label, trial.seed))
        known, fate = self.agenda.known[trial.id], self.fate.get((trial.label, trial.seed), {})
        for step in range(known.step + EVERY, STEPS + 1, EVERY):
            if step in fate:
                facts = {"packed": not known.alone} if fate[step] == "out_of_memory" else {}
                self.write(trial, step - EVERY, fate[step], **facts)
                break
            self.write(trial, step, "running" if step < STEPS else "finished")
            metric = {self.agenda.sweep.metric: self.value(trial, step)}
            if not self.agenda.report(trial.id, step, metric) and step < STEPS:
                self.write(trial, step, "stopped")
                break
        self.agenda.close(trial.id)

    def all(self, most=10_000):
        while most and (trial := self.agenda.start()) is not None:
            self.run(trial)
            most -= 1
        return self


def steps(agenda):
    """{(label, seed): how far it came}"""
    return {(t.label, t.seed): agenda.known[t.id].step for t in agenda.trials.values()}


def test_every_variant_gets_every_seed_the_baseline_first(tmp_path, tiny):
    agenda = Agenda(*expand(write_sweep(tmp_path, tiny, seeds=2, baseline="fair")))
    order = Pretender(agenda).all().started
    assert agenda.over()
    names = ["fair", "base", "good", "poor", "bad"]
    assert order == [(name, seed) for seed in (0, 1) for name in names]
    assert set(steps(agenda).values()) == {STEPS}


def test_variants_are_judged_over_all_their_seeds_and_the_baseline_never_stops(tmp_path, tiny):
    asha = {"grace_steps": 4, "reduction_factor": 2, "controls": 0}
    path = write_sweep(tmp_path, tiny, seeds=2, asha=asha)
    agenda = Agenda(*expand(path))
    Pretender(agenda).all()
    assert agenda.over()
    assert agenda.rungs == (4, 8)
    expected = {"base": 16, "good": 16, "fair": 8, "poor": 4, "bad": 4}
    assert steps(agenda) == {(n, s): e for n, e in expected.items() for s in (0, 1)}
    why = agenda.verdicts_of_rungs()
    assert len(why) == 6
    assert all(text.startswith("at step ") for text in why.values())


def test_a_new_agenda_goes_on_from_the_records_as_the_old_one_would_have(tmp_path, tiny):
    asha = {"grace_steps": 4, "reduction_factor": 2, "controls": 0.2}
    path = write_sweep(tmp_path, tiny, seeds=2, asha=asha)
    whole = Agenda(*expand(path, ("runtime.results=" + str(tmp_path / "whole"),)))
    Pretender(whole).all()
    rng = random.Random(0)
    while True:
        agenda = Agenda(*expand(path))
        if agenda.over():
            break
        Pretender(agenda).all(most=rng.randint(1, 3))
    by_name = {(t.label, t.seed): whole.known[t.id].step for t in whole.trials.values()}
    assert steps(agenda) == by_name


def test_more_seeds_values_and_steps_run_only_what_is_new(tmp_path, tiny):
    path = write_sweep(tmp_path, tiny, names=["base", "good"])
    Pretender(Agenda(*expand(path))).all()
    assert Agenda(*expand(path)).over()
    path = write_sweep(tmp_path, tiny, names=["base", "good", "bad"], seeds=2)
    agenda = Agenda(*expand(path))
    order = Pretender(agenda).all().started
    assert order == [("bad", 0), ("base", 1), ("good", 1), ("bad", 1)]
    longer = Agenda(*expand(path, ("train.steps=24",)))
    assert not longer.over()
    first = longer.start()
    assert longer.known[first.id].step == STEPS
    assert set(longer.trials) == set(agenda.trials)


def test_a_trial_that_diverged_is_not_started_again_and_one_that_failed_is_next_time(
    tmp_path, tiny
):
    path = write_sweep(tmp_path, tiny)
    agenda = Agenda(*expand(path))
    fate = {("good", 0): {8: "diverged"}, ("fair", 0): {8: "failed"}}
    assert len(Pretender(agenda, fate=fate).all().started) == 5
    assert agenda.over()
    again = Agenda(*expand(path))
    assert Pretender(again).all().started == [("fair", 0)]


def test_out_of_memory_beside_others_is_tried_once_more_alone(tmp_path, tiny):
    agenda = Agenda(*expand(write_sweep(tmp_path, tiny, names=["base", "good"])))
    fate = {("good", 0): {8: "out_of_memory"}}
    order = Pretender(agenda, fate=fate).all().started
    assert order == [("base", 0), ("good", 0), ("good", 0)]
    assert agenda.over()


def test_screening_gives_fresh_seeds_to_the_most_promising(tmp_path, tiny):
    path = write_sweep(tmp_path, tiny, screening={"shortlist": 2, "seeds": 3})
    agenda = Agenda(*expand(path))
    order = Pretender(agenda).all().started
    assert [seed for _, seed in order[:5]] == [0] * 5
    assert sorted(order[5:]) == [(n, s) for n in ("base", "fair", "good") for s in (1, 2, 3)]
    assert agenda.over()
    agenda.write_manifest()
    manifest = json.loads((tmp_path / "results" / "tiny" / "sweep.json").read_text())
    assert manifest["screening_seed"] == 0
    good = next(v for v in manifest["variants"].values() if v["label"] == "good")
    assert set(good["runs"]) == {"0", "1", "2", "3"}
    assert Agenda(*expand(path)).over()


def test_a_screening_that_was_cut_short_goes_on_with_the_same_shortlist(tmp_path, tiny):
    path = write_sweep(tmp_path, tiny, screening={"shortlist": 2, "seeds": 3})
    agenda = Agenda(*expand(path))
    Pretender(agenda).all(most=7)
    agenda.write_manifest()
    chosen = agenda.confirmation
    again = Agenda(*expand(path))
    assert again.confirmation == chosen
    assert len(Pretender(again).all().started) == 7


def test_new_variants_are_screened_before_another_shortlist_is_made(tmp_path, tiny):
    keys = {"screening": {"shortlist": 1, "seeds": 2}}
    path = write_sweep(tmp_path, tiny, names=["base", "fair", "bad"], **keys)
    agenda = Agenda(*expand(path))
    Pretender(agenda).all()
    agenda.write_manifest()
    path = write_sweep(tmp_path, tiny, names=["base", "fair", "bad", "good"], **keys)
    agenda = Agenda(*expand(path))
    order = Pretender(agenda).all().started
    assert order == [("good", 0), ("good", 1), ("good", 2)]


def test_a_budget_ends_a_sweep_where_it_can_go_on(tmp_path, tiny):
    clock = [0.0]

    class Costly(Pretender):
        def run(self, trial):
            clock[0] += 3600
            super().run(trial)

    path = write_sweep(tmp_path, tiny, budget={"gpu_hours": 3.2})
    agenda = Agenda(*expand(path), now=lambda: clock[0])
    assert len(Costly(agenda).all().started) == 4
    assert agenda.spent()
    assert agenda.over()
    assert agenda.hours() == pytest.approx(4)
    again = Agenda(*expand(path), now=lambda: clock[0])
    assert again.over()
    more = Agenda(*expand(path, ("budget.gpu_hours=9",)), now=lambda: clock[0])
    assert Costly(more).all().started == [("poor", 0), ("bad", 0)]
    assert not more.spent()


@pytest.mark.parametrize(
    ("asked", "runs", "found"),
    [
        ((3, 3), 12, (3, 3)),
        ((3, 3), 11, (3, 2)),
        ((3, 3), 7, (2, 2)),
        ((3, 5), 5, (1, 2)),
        ((3, 3), 3, (0, 0)),
        ((0, 3), 100, (0, 3)),
    ],
)
def test_a_shortlist_is_cut_to_what_the_budget_pays_for(asked, runs, found):
    assert affordable(*asked, runs) == found


def test_verdicts_at_another_number_of_seeds_are_counted(tmp_path, tiny):
    for seeds, looks in ((1, []), (2, [2]), (2, [2]), (4, [2, 4])):
        agenda = Agenda(*expand(write_sweep(tmp_path, tiny, names=["base", "good"], seeds=seeds)))
        Pretender(agenda).all()
        agenda.look()
        assert agenda.looks == looks
