"""What a blind test leaves behind: one file per session, written as answers come, read back beside
the scores."""

import json
import math
import secrets
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from bgray import storage
from bgray.hearing import Agreement, Mode, Round, agreement, average_ranks, guessing, normalised
from bgray.problems import ConfigError

FOLDER = "listening"
RUNNING_SECONDS = 3600
"""Without an answer for so long, an unfinished session has been broken off."""
Kind = Literal["abx", "ranking"]


def now() -> str:
    """UTC, to the second, as in run.json."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Record:
    """One session's file; nothing is written before there is an answer."""

    sweep: str
    """The sweep's folder, local or s3://."""
    kind: Kind
    lanes: list[dict[str, Any]]
    """{"variant", "label", "run", "seed"} each; for the target and the input variant and run are
    "target" or "input"."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What holds for the whole session: who, clip, step, gains, number of trials or rounds."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    started: str = field(default_factory=now)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """So that no session overwrites another's, on whatever machine."""

    @property
    def url(self) -> str:
        time = self.started.replace("-", "").replace(":", "")
        return storage.join(self.sweep, FOLDER, f"{time}-{self.token}.json")

    def add(self, answer: dict[str, Any], *, complete: bool) -> None:
        """Keep one answer. It counts only once it is written: OSError, also where the sweep's
        folder is gone, leaves the session as it was."""
        if not storage.exists(self.sweep):  # to write would make the folder anew
            raise FileNotFoundError(f"{self.sweep}: the sweep is not there any more")
        answers = [*self.answers, {**answer, "when": now()}]
        written = {
            "kind": self.kind,
            "started": self.started,
            **self.facts,
            "lanes": self.lanes,
            "complete": complete,
            "answers": answers,
        }
        storage.write_bytes(self.url, json.dumps(written, indent=1).encode() + b"\n")
        self.answers = answers


# --- read back


@dataclass(frozen=True)
class Ranked:
    """One variant in all rankings at one step, of one source."""

    variant: str
    label: str
    mean_rank: float
    """Average rank where tied; 1 is best."""
    place: float
    """The same from 0, best of all that were there, to 1, worst."""
    answers: int
    sessions: int
    step: int | None
    """The last one at which variants were ranked."""
    source: str | None
    where: str
    """Step and source in words; what earlier steps were left out."""


@dataclass(frozen=True)
class Pair:
    """Two variants in all ABX tests of one source at one step that went to their end."""

    variants: tuple[str, str]
    labels: tuple[str, str]
    right: int
    trials: int
    p_value: float | None
    """Of guessing as well or better, in the one finished session. None without one, and over
    several: whoever goes on until it looks well gets there by guessing."""
    pooled_p: float | None
    """The same over several sessions: true only if their number was fixed beforehand."""
    sessions: int
    broken_off: int
    """Sessions that ended early. They do not count: whoever stops when it goes well is right too
    often."""
    running: int
    """Sessions that are not at their end yet, and were answered within the last hour."""
    step: int | None
    source: str | None
    where: str
    text: str
    """All of it, in words."""


@dataclass(frozen=True)
class Heard:
    """What ears said about a sweep, for each source at the last step that was compared."""

    ranked: tuple[Ranked, ...] = ()
    """Source by source, best first."""
    pairs: tuple[Pair, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    """The sweep's own metric first."""
    sessions: int = 0
    damaged: tuple[str, ...] = ()
    """Files that were skipped, with the reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Session = dict[str, Any]
_READ: dict[str, dict[str, tuple[storage.Stamp, Session | str]]] = {}
"""By folder and name: a session's file as it was, or why it was skipped. A page asks for all of
them whenever something has changed."""


def results_of(folder: str) -> Heard:
    """Of a sweep's folder, local or s3://; empty where nobody has listened. A damaged file is
    named in `damaged` and skipped."""
    place = storage.join(folder, FOLDER)
    known, read = _READ.get(place, {}), {}
    for name, stamp in sorted(storage.stamps(place).items()):
        if name.endswith(".json") and "/" not in name:
            before, found = known.get(name, (None, None))
            if before != stamp:
                found = _read(storage.join(place, name), name)
            if found is not None:  # None: deleted since the listing
                read[name] = stamp, found
    if read:
        _READ[place] = read
    else:
        _READ.pop(place, None)
    every = [found for _, found in read.values()]
    sessions = [found for found in every if not isinstance(found, str)]
    answered = [s for s in sessions if s["answers"]]
    groups = _last(s for s in answered if s["kind"] == "ranking")
    return Heard(
        tuple(one for where, group in groups for one in _ranked(group, where)),
        _pairs([s for s in answered if s["kind"] == "abx"]),
        tuple(one for where, group in groups for one in _agreements(group, where)),
        len(sessions),
        tuple(found for found in every if isinstance(found, str)),
    )


def _read(url: str, name: str) -> Session | str | None:
    """One session, or why it is none; None where there is no such file."""
    try:
        found = storage.read_json(url)
        return None if found is None else _checked(found)
    except ConfigError as error:
        return f"{name}: {error.problems[0][1].split(';')[0]}"
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"{name}: no blind test ({type(error).__name__}: {error})"


def _checked(session: Session) -> Session:
    """As it was, or an error: a file by hand, or of another program, must not break the page."""
    lanes, answers = session["lanes"], session["answers"]
    if not all(isinstance(lane[key], str) for lane in lanes for key in ("variant", "label")):
        raise ValueError("lanes: a variant and a label each")
    if session["kind"] == "abx":
        if len(lanes) != 2 or not all(isinstance(answer["right"], bool) for answer in answers):
            raise ValueError("two lanes, and true or false for each answer")
        if session["complete"] and len(answers) != session["trials"]:
            raise ValueError(f"{len(answers)} answers of {session['trials']} trials")
    elif session["kind"] == "ranking":
        for answer in answers:
            if len(lanes) < 2 or not _numbers(answer["ranks"], len(lanes)):
                raise ValueError("ranks: one for each of at least two lanes")
            for metric, values in answer.get("scores", {}).items():
                known = [value for value in values if value is not None]
                if len(values) != len(lanes) or not _numbers(known, len(known)):
                    raise ValueError("scores: one for each lane")
                if session["modes"][metric] not in ("min", "max"):
                    raise ValueError("modes: 'min' or 'max'")
    else:
        raise ValueError(f"kind: 'abx' or 'ranking', got {session['kind']!r}")
    step, source = session.get("step"), session.get("source")
    if type(step) not in (int, type(None)) or not isinstance(source, str | None):
        raise ValueError("step: a number, source: a name or null")
    if answers:
        _age(session)
    return session


def _age(session: Session) -> float:
    """Seconds since its last answer; endless where that has no time."""
    when = session["answers"][-1].get("when")
    return (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds() if when else math.inf


def _last(sessions: Iterable[Session]) -> list[tuple[str, list[Session]]]:
    """Of each source the sessions at the last step that was compared, with that in words. What
    several steps say is not one result: what was compared are other weights."""
    groups: dict[str, dict[int, list[Session]]] = defaultdict(lambda: defaultdict(list))
    for session in sessions:
        step = session.get("step")
        groups[session.get("source") or ""][-1 if step is None else step].append(session)
    found = []
    for source, steps in sorted(groups.items()):
        last, earlier = max(steps), sorted(step for step in steps if 0 <= step < max(steps))
        words = [source] if source else []
        words += [f"at step {last:,}"] if last >= 0 else []
        words += [f"(not counted: step {', '.join(f'{s:,}' for s in earlier)})"] if earlier else []
        found.append((" ".join(words), steps[last]))
    return found


def _numbers(values: list[Any], count: int) -> bool:
    plain = all(type(value) in (int, float) and math.isfinite(value) for value in values)
    return plain and len(values) == count


def _ranked(sessions: Sequence[Session], where: str) -> list[Ranked]:
    places: dict[str, list[tuple[float, float]]] = defaultdict(list)
    labels, seen = {}, defaultdict(set)
    for number, session in enumerate(sessions):
        for answer in session["answers"]:
            ranks = average_ranks(answer["ranks"]), normalised(answer["ranks"])
            for lane, rank, place in zip(session["lanes"], *ranks, strict=True):
                variant = lane["variant"]
                places[variant].append((rank, place))
                labels[variant] = lane["label"]
                seen[variant].add(number)
    found = [
        Ranked(
            variant,
            labels[variant],
            sum(rank for rank, _ in ranks) / len(ranks),
            sum(place for _, place in ranks) / len(ranks),
            len(ranks),
            len(seen[variant]),
            sessions[0].get("step"),
            sessions[0].get("source"),
            where,
        )
        for variant, ranks in places.items()
    ]
    return sorted(found, key=lambda one: (one.place, one.label))


def _pairs(sessions: Sequence[Session]) -> tuple[Pair, ...]:
    groups: dict[tuple[str, ...], list[Session]] = defaultdict(list)
    for session in sessions:
        groups[tuple(sorted(lane["variant"] for lane in session["lanes"]))].append(session)
    found = []
    for (a, b), group in groups.items():
        labels = {lane["variant"]: lane["label"] for s in group for lane in s["lanes"]}
        done = {(s.get("source"), s.get("step")) for s in group if s["complete"]}
        sources = {source for source, _ in done}
        # A step at which a test was only begun does not hide what an earlier one has shown.
        shown = [
            s
            for s in group
            if s.get("source") not in sources or (s.get("source"), s.get("step")) in done
        ]
        for where, of_step in _last(shown):
            found.append(_pair((a, b), (labels[a], labels[b]), of_step, where))
    return tuple(sorted(found, key=lambda pair: (pair.labels, pair.source or "")))


def _pair(
    variants: tuple[str, str], labels: tuple[str, str], sessions: list[Session], where: str
) -> Pair:
    whole = [s for s in sessions if s["complete"]]
    running = [s for s in sessions if not s["complete"] and _age(s) < RUNNING_SECONDS]
    off = len(sessions) - len(whole) - len(running)
    counts = [(sum(a["right"] for a in s["answers"]), len(s["answers"])) for s in whole]
    right, trials = sum(r for r, _ in counts), sum(n for _, n in counts)
    every = [f"{r} of {n} right, p = {guessing(r, n):.2g}" for r, n in counts]
    p = guessing(right, trials) if trials else None
    if len(whole) > 1:
        every.append(
            f"over all {len(whole)} sessions {right} of {trials}, p = {p:.2g} if their number was "
            "fixed beforehand"
        )
    clips = sorted({s["item"] for s in whole if type(s.get("item")) is int})
    if clips:
        every.append(f"clip{'s' * (len(clips) > 1)} {', '.join(f'{i:03d}' for i in clips)}")
    every += [f"{off} broken off"] if off else []
    every += [f"{len(running)} still running"] if running else []
    return Pair(
        variants,
        labels,
        right,
        trials,
        p if len(whole) == 1 else None,
        p if len(whole) > 1 else None,
        len(whole),
        off,
        len(running),
        sessions[0].get("step"),
        sessions[0].get("source"),
        where,
        f"{' and '.join(labels)}{' ' * bool(where)}{where}: {'; '.join(every)}",
    )


def _agreements(sessions: Iterable[Session], where: str) -> list[Agreement]:
    rounds: dict[str, list[Round]] = defaultdict(list)
    modes: dict[str, Mode] = {}
    first: list[str] = []
    for session in sessions:
        source = session.get("source")
        suffix = f"_{source}" if source else ""
        first.append(f"{session.get('metric', '')}{suffix}")
        variants = [lane["variant"] for lane in session["lanes"]]
        for answer in session["answers"]:
            scores = answer.get("scores", {})
            for metric, values in scores.items():
                # Who heard one source has not heard what a mean over all, or another's score, says.
                if suffix and metric.removesuffix(suffix) not in scores.keys() - {metric}:
                    continue
                rounds[metric].append((variants, answer["ranks"], values))
                modes[metric] = session["modes"][metric]
    order = sorted(rounds, key=lambda metric: (metric not in first, metric))
    return [agreement(metric, modes[metric], rounds[metric], where) for metric in order]
