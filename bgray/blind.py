"""Blind tests on the side that knows the answers: ABX and blind ranking, one question at a time."""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bgray.answers import Record
from bgray.clips import Clip, Source, Trial, clip, level, samples
from bgray.encoding import wav
from bgray.hearing import average_ranks, better_way, guessing, in_words, matched, normalised

MOST_TRIALS, FEWEST_TRIALS = 100, 5  # four right of four happen by guessing once in 16 times
MOST_LANES = 9
REFERENCES = ("target", "input")


class Refused(ValueError):
    """What the page asked for cannot be; the text is for people."""


class Later(Exception):
    """The answer was kept, but the next question cannot be made now; to be asked for again."""


@dataclass
class Test:
    """One session: what is asked now and under which addresses it can be heard.

    The page gets sounds that are equally loud already, under addresses that say nothing and end
    with the question. It could tell X from A and B by comparing bytes: ears cannot.

    A reply may be lost on its way, or the next question's clips not be had: so an answer that was
    kept can be sent again, and gives what it would have given.
    """

    source: Source
    record: Record
    lanes: list[Trial | str]
    """Runs; "target" and "input" in ABX."""
    rounds: list[int]
    """ABX: as many times the same item as there are trials. Ranking: one item each."""
    voice: str | None
    step: int
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    number: int = 0
    question: dict[str, Any] | None = None
    """As the page knows it; None once it is answered."""
    names: dict[str, int] = field(default_factory=dict)
    """Of the question's sounds: token to place in `made`."""
    made: list[bytes] = field(default_factory=list)
    """Their files; empty where they were let go, to be made again when they are asked for."""
    given: Any = None
    """The answer that was kept last, as the page sent it."""
    hidden: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    began: float = 0.0

    @property
    def kind(self) -> str:
        return self.record.kind

    def ask(self) -> dict[str, Any]:
        """The next question, as the page may know it."""
        sounds, gains, trim = _equally_loud(self, self.rounds[self.number])
        self.number += 1
        self.made = sounds
        self.began = time.monotonic()
        if self.kind == "abx":
            x = secrets.randbelow(2)
            names = {"a": 0, "b": 1, "x": x}
            self.hidden = {"x": "ab"[x]}
            self.record.facts |= {"gains_db": gains, "trim_db": trim}  # of every trial
        else:
            order = list(range(len(self.lanes)))
            secrets.SystemRandom().shuffle(order)
            names = {chr(ord("a") + i): lane for i, lane in enumerate(order)}
            if len(sounds) > len(order):
                names["reference"] = len(order)
            self.hidden = {"order": order}
        self.hidden |= {"gains_db": gains, "trim_db": trim}
        tokens = {name: secrets.token_urlsafe(12) for name in names}
        self.names = {tokens[name]: names[name] for name in names}
        self.question = {
            "session": self.id,
            "kind": self.kind,
            "number": self.number,
            "of": len(self.rounds),
            "item": self.rounds[self.number - 1],
            "sounds": tokens,
        }
        return self.question

    def sound(self, token: str) -> bytes | None:
        """The file behind an address of the question that is asked now; None of any other."""
        with self.lock:
            if self.question is None or token not in self.names:
                return None
            made = self.made or _equally_loud(self, self.rounds[self.number - 1])[0]
            self.made = made
            return made[self.names[token]]

    @property
    def held(self) -> int:
        """Bytes of sound."""
        return sum(len(data) for data in self.made)

    def answer(self, number: Any, given: Any) -> dict[str, Any]:
        """Keep the answer to question `number`; gives the next question, or the result. The one
        kept last may be sent again."""
        with self.lock:
            kept = len(self.record.answers)
            if kept and number == kept and given == self.given:
                return self._next()
            if type(number) is not int or number != kept + 1 or self.question is None:
                raise Refused(f"this is question {kept + 1}, not {number}")
            facts = {"number": number, "seconds": round(time.monotonic() - self.began, 1)}
            make = self._abx if self.kind == "abx" else self._ranking
            self.record.add({**facts, **make(given)}, complete=number == len(self.rounds))
            self.given, self.question, self.made = given, None, []
            return self._next()

    def _next(self) -> dict[str, Any]:
        if len(self.record.answers) == len(self.rounds):
            return self._result()
        try:
            return self.question or self.ask()
        except Refused as error:
            raise Later(str(error)) from error

    def _abx(self, given: Any) -> dict[str, Any]:
        if given not in ("a", "b"):
            raise Refused(f"answer: 'a' or 'b', got {given!r}")
        return {"x": self.hidden["x"], "answer": given, "right": given == self.hidden["x"]}

    def _ranking(self, given: Any) -> dict[str, Any]:
        count = len(self.lanes)
        places = given if isinstance(given, list) else []
        if len(places) != count or not all(type(p) is int and 1 <= p <= count for p in places):
            raise Refused(f"answer: {count} places from 1 to {count}, got {given!r}")
        order = self.hidden["order"]
        item = self.rounds[self.number - 1]
        return {
            "item": item,
            "order": order,
            "ranks": [places[order.index(lane)] for lane in range(count)],
            "gains_db": self.hidden["gains_db"][:count],
            "trim_db": self.hidden["trim_db"],
            "scores": _scores(self.lanes, self.step, item),
        }

    def _result(self) -> dict[str, Any]:
        answers = self.record.answers
        result: dict[str, Any] = {
            "session": self.id,
            "kind": self.kind,
            "done": True,
            "file": self.record.url.rsplit("/", 1)[-1],
        }
        labels = [lane["label"] for lane in self.record.lanes]
        if self.kind == "abx":
            right, trials = sum(answer["right"] for answer in answers), len(answers)
            words = in_words(right, trials)
            p = guessing(right, trials)
            return {**result, "right": right, "trials": trials, "p": p, "text": words}
        ranks = np.mean([average_ranks(answer["ranks"]) for answer in answers], 0)
        places = np.mean([normalised(answer["ranks"]) for answer in answers], 0)
        rows = [
            {"label": label, "mean_rank": float(rank), "place": float(place)}
            for label, rank, place in zip(labels, ranks, places, strict=True)
        ]
        return {**result, "rows": sorted(rows, key=lambda row: row["place"])}


def _scores(lanes: Sequence[Trial | str], step: int, item: int) -> dict[str, list[float | None]]:
    """Of the clip that was heard, one per lane."""
    found = [{} if isinstance(lane, str) else dict(lane.scores.get(step, {})) for lane in lanes]
    return {
        metric: [
            of_lane[metric][item] if item < len(of_lane.get(metric, ())) else None
            for of_lane in found
        ]
        for metric in sorted({metric for of_lane in found for metric in of_lane})
    }


def _clip(test: Test, lane: Trial | str, item: int) -> Clip:
    if isinstance(lane, str):
        runs = [run for run in test.lanes if not isinstance(run, str)] or list(test.source.runs)
        found = (clip(run, item, lane, test.voice) for run in runs)
        one = next((one for one in found if one is not None), None)
    else:
        one = clip(lane, item, test.step, test.voice)
    if one is None:
        name = lane if isinstance(lane, str) else f"{lane.label} (seed {lane.seed})"
        raise Refused(f"{name}: no clip {item:03d} at step {test.step}")
    return one


def _equally_loud(test: Test, item: int) -> tuple[list[bytes], list[float], float]:
    """(WAV files of the lanes, and last of a ranking's reference, gains in dB, trim) of a
    question about a clip: float32, one rate, one length, so that nothing but the sound tells them
    apart."""
    chosen = [_clip(test, lane, item) for lane in test.lanes]
    try:
        target = _clip(test, "target", item)
    except Refused:
        target = None
    try:
        every = [*chosen, *([target] if target else [])]
        loudness = matched([level(one) for one in every], len(chosen) if target else None)
        heard = chosen if test.kind == "abx" else every
        audio = [samples(one) for one in heard]
    except ValueError as error:
        raise Refused(str(error)) from error
    if len({rate for _, rate in audio} | {a.shape[1] * 10**6 for a, _ in audio}) != 2:
        raise Refused("the clips differ in sample rate or channels")
    length = min(len(a) for a, _ in audio)
    files = [
        wav((a[:length].T * 10 ** (gain / 20)).astype(np.float32), rate)
        for (a, rate), gain in zip(audio, loudness.gains_db, strict=False)
    ]
    gains = [round(gain, 3) for gain in loudness.gains_db[: len(heard)]]
    return files, gains, round(loudness.trim_db, 3)


def begin(source: Source, asked: dict[str, Any]) -> Test:
    """A session as the page asks for it; Refused says what is wrong with that."""
    kind = asked.get("kind")
    if kind not in ("abx", "ranking"):
        raise Refused(f"kind: 'abx' or 'ranking', got {kind!r}")
    lanes = _lanes(source, asked.get("lanes"), kind)
    step, voice = asked.get("step"), asked.get("source")
    if type(step) is not int or not (voice is None or isinstance(voice, str)):
        raise Refused("step: a number, source: a name or null")
    rounds: Any = asked.get("items")
    if kind == "abx":
        trials = asked.get("trials", 16)
        if type(trials) is not int or not FEWEST_TRIALS <= trials <= MOST_TRIALS:
            raise Refused(f"trials: {FEWEST_TRIALS} to {MOST_TRIALS}, got {trials!r}")
        rounds = [asked.get("item")] * trials
    if not isinstance(rounds, list) or not rounds or not all(type(i) is int for i in rounds):
        raise Refused("items: numbers of clips, at least one")
    if len(rounds) > MOST_TRIALS or (kind == "ranking" and len(set(rounds)) < len(rounds)):
        raise Refused(f"items: each once, at most {MOST_TRIALS}")
    who = asked.get("who")
    if who is not None and not isinstance(who, str):
        raise Refused("who: text")
    metrics = {m for lane in lanes if not isinstance(lane, str) for m in lane.scores.get(step, {})}
    facts: dict[str, Any] = {
        "sweep": source.name,
        "who": " ".join("".join(c if c.isprintable() else " " for c in who).split())[:80]
        if who
        else None,
        "step": step,
        "source": voice,
        "metric": source.metric,
        "modes": {m: better_way(m, source.metric, source.mode) for m in sorted(metrics)},
    }
    if kind == "abx":
        facts |= {"item": rounds[0], "trials": len(rounds)}
    else:
        facts |= {"items": rounds}
    record = Record(source.url, kind, [_described(lane) for lane in lanes], facts)
    test = Test(source, record, lanes, rounds, voice, step)
    for item in sorted(set(rounds)):
        for lane in lanes:
            _clip(test, lane, item)  # a clip that is not there must not end the test half way
    return test


def _lanes(source: Source, asked: Any, kind: str) -> list[Trial | str]:
    if not isinstance(asked, list) or not all(isinstance(one, str) for one in asked):
        raise Refused("lanes: ids of runs")
    runs = {run.id: run for run in source.runs}
    allowed = REFERENCES if kind == "abx" else ()
    unknown = [one for one in asked if one not in runs and one not in allowed]
    if unknown:
        raise Refused(f"lanes: no such run, {unknown[0][:40]!r}")
    fits = len(asked) == 2 if kind == "abx" else 2 <= len(asked) <= MOST_LANES
    if not fits or len(set(asked)) < len(asked):
        count = "two" if kind == "abx" else f"2 to {MOST_LANES}"
        raise Refused(f"lanes: {count} different ones")
    return [runs[one] if one in runs else one for one in asked]


def _described(lane: Trial | str) -> dict[str, Any]:
    if isinstance(lane, str):
        return {"variant": lane, "label": lane, "run": lane, "seed": None}
    return {"variant": lane.variant, "label": lane.label, "run": lane.id, "seed": lane.seed}
