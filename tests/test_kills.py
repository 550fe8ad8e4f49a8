"""The kill matrix: kill -9 of each kind of process at random moments of a small sweep, until it has
happened BGRAY_KILLS times; what the sweep leaves is what it leaves undisturbed.

`pytest -m slow tests/test_kills.py -s` prints the counts.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from test_tensorboard import shown_as_they_are

from bgray.records import read_info, read_lines, runs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

KILLS = int(os.environ.get("BGRAY_KILLS", "10"))
"""Of each kind of process."""
SECONDS = 150
"""Within which whatever is waited for here must have come."""
TRIAL, WORKER = ("ray::ResourceTrainable",), ("ray::MapBatches", "ray::Read", "ray::_MapWorker")


# --- processes


def stat(pid):
    """Of /proc/PID/stat what follows the name; nothing for the dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


def words(pid):
    """The command line, or the title that Ray has given the process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def below(root):
    """Numbers of the living processes that `root` has started, and that those have started."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        if fields := stat(name):
            children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


def marked(mark):
    """Numbers of the living processes with this mark in their environment, whoever their parent is
    now."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment and stat(name):
            found.append(int(name))
    return found


def wait_until(true, seconds=SECONDS, step=0.02):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"it did not come to that within {seconds} s"
        time.sleep(step)
    return found


class Command:
    """One start of `python -m bgray.sweep`, in a session and with a mark of its own."""

    def __init__(self, sweep, results, out):
        self.mark, self.out = f"BGRAY_MARK={uuid.uuid4().hex}", out
        self.began = time.monotonic()
        variable, _, value = self.mark.partition("=")
        with out.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bgray.sweep", str(sweep), "--set",
                 f"runtime.results={results}"],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Ray's titles must not be written over the environment.
                env={**os.environ, variable: value, "SPT_NOENV": "1"},
            )  # fmt: skip

    def ended(self):
        return self.process.poll() is not None

    def named(self, *names):
        """Its processes whose title begins, or whose program ends, with one of the names."""
        return [
            pid
            for pid in below(self.process.pid)
            if (title := words(pid)).startswith(names) or title.split(" ")[0].endswith(names)
        ]

    def wait(self):
        wait_until(self.ended, step=0.1)
        return self.process.returncode

    def left(self):
        """Titles of its processes that are still there."""
        return [title for pid in marked(self.mark) if (title := words(pid))]

    def end(self):
        """Whatever happens, nothing of it stays."""
        for pid in [self.process.pid, *marked(self.mark)]:
            if pid != self.process.pid or not self.ended():
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


# --- sweeps


@dataclasses.dataclass
class Undisturbed:
    sweep: Path
    folder: Path
    seconds: float
    """Of the whole command."""
    start_up_seconds: float
    """Until its first trial has trained."""


@pytest.fixture(scope="module")
def commands():
    """Starts commands; none of their processes outlives the tests."""
    started = []

    def start(*args):
        started.append(Command(*args))
        return started[-1]

    yield start
    try:
        # Ray's agents wait for the rest of it for a minute, and workers that were just starting for
        # half a minute; what trains has ended within seconds.
        wait_until(lambda: not any(command.left() for command in started), seconds=90, step=0.5)
    finally:
        for command in started:
            command.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards_url, commands):
    """(**keys of the sweep) -> that sweep, run without any disturbance."""
    from conftest import TINY

    known = {}

    def run(**keys):
        name = json.dumps(keys, sort_keys=True)
        if name not in known:
            root = tmp_path_factory.mktemp("undisturbed")
            known[name] = measured(root, whole(shards_url, TINY, keys), commands)
        return known[name]

    return run


def whole(shards_url, tiny, keys):
    """A sweep of two variants with two seeds that trains for ten seconds or so."""
    return {
        **tiny,
        "name": "tiny",
        "data": {**tiny["data"], "path": shards_url},
        "train": {"steps": 400, "batch_size": 4},
        "validation": {**tiny["validation"], "every": 50},
        "runtime": {
            **tiny["runtime"],
            "log_every": 5,
            "checkpoint_every": 10,
            **keys.get("runtime", {}),
        },
        "optim": {"name": "adamw", "lr": 1e-3},
        "seeds": 2,
        "variants": {"slow": {"optim.lr": 1e-5}, "fast": {"optim.lr": 1e-2}},
        **{key: value for key, value in keys.items() if key != "runtime"},
    }


def measured(root, raw, commands):
    sweep, folder = root / "tiny.yaml", root / "results" / "tiny"
    sweep.write_text(yaml.safe_dump(raw))
    command = commands(sweep, root / "results", root / "out.txt")
    wait_until(lambda: command.ended() or list(folder.glob("*/metrics.jsonl")))
    start_up = time.monotonic() - command.began
    assert command.wait() == 0, command.out.read_text()
    return Undisturbed(sweep, folder, time.monotonic() - command.began, start_up)


def attempts(folder):
    return sum(len(run.info.get("attempts", [])) for run in runs(str(folder)))


def training(folder):
    """Numbers of the processes that have begun a trial."""
    return [run.info["attempts"][-1]["pid"] for run in runs(str(folder)) if run.state == "running"]


def lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))


def has_gone_on(folder):
    """Whether every trial that runs has a checkpoint beyond where it was started, and one runs."""
    running = [run for run in runs(str(folder)) if run.state == "running"]
    for run in running:
        pointer = folder / run.id / "checkpoint" / "latest"
        name = pointer.read_text().split()[0] if pointer.exists() else "step-0.pt"
        if int(name[5:-3]) <= run.info["attempts"][-1]["from_step"]:
            return False
    return bool(running)


def litter(folder):
    """What a process that is killed in the midst of writing leaves, where it is at it."""
    for run in runs(str(folder)):
        if run.state == "running":
            (folder / run.id / ".run.json.abcd1234").write_text("{")
            (folder / run.id / "checkpoint").mkdir(exist_ok=True)
            (folder / run.id / "checkpoint" / ".step-00000010.pt.abcd1234").write_text("P")
            (folder / ".sweep.json.abcd1234").write_text("{")


def table(folder):
    """What `python -m bgray.compare` says of a sweep."""
    done = subprocess.run(
        [sys.executable, "-m", "bgray.compare", str(folder), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_equal(folder, undisturbed):
    """Curves to the last byte, states, the final table; and nothing is left lying about."""
    expected = runs(str(undisturbed))
    assert len(expected) == 4
    assert {run.id for run in runs(str(folder))} == {run.id for run in expected}
    for one in expected:
        other, info = folder / one.id, read_info(str(folder / one.id)) or {}
        for key in ("state", "reason", "step", "metrics", "baseline", "baseline_items", "warnings"):
            assert info.get(key) == one.info.get(key), (one.id, key)
        for name in ("metrics.jsonl", "validation_items.jsonl"):
            assert (other / name).read_bytes() == Path(one.url, name).read_bytes(), (one.id, name)
            # Training and evaluation of a step have a line each.
            steps = [(line["step"], "val" in line) for line in read_lines(f"{other}/{name}")]
            assert steps == sorted(set(steps))
        there = {str(path.relative_to(other)) for path in other.rglob("*")}
        ours = {str(path.relative_to(one.url)) for path in Path(one.url).rglob("*")}
        # Other commits or changes of this repository meanwhile are another matter.
        assert {p for p in there ^ ours if not p.startswith("changes-")} == set(), one.id
    assert table(folder) == table(undisturbed)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in undisturbed.iterdir()}, "a lease or a temporary file"


# --- counts


@dataclasses.dataclass
class Count:
    kind: str
    kills: int = 0
    starting: int = 0
    """Of the kills: before that process, or a trial of that command, had begun to train."""
    sweeps: int = 0
    commands: int = 0
    recovered: list[float] = dataclasses.field(default_factory=list)
    """Seconds from a kill until a trial went on; without kills that the next one outran."""

    def line(self):
        mean = sum(self.recovered) / len(self.recovered) if self.recovered else float("nan")
        return (
            f"{self.kind:24} {self.kills:5} {self.starting:8} {self.sweeps:6} {self.commands:8} "
            f"{mean:8.1f} {max(self.recovered, default=float('nan')):7.1f}"
        )


@pytest.fixture(scope="module")
def counts():
    found = []
    yield found
    head = f"\n{'killed':24} kills starting sweeps commands recover_s max_s"
    print("\n".join([head, *(count.line() for count in found)]))


# --- tests


REGISTERING = "Failed to register worker to Raylet"
ENDS = {"driver": (), "raylet": ("/raylet",), "gcs_server": ("/gcs_server",)}
ASHA = {
    # One at a time: what a rung decides depends on what has come before.
    "runtime": {"concurrency": 1},
    "asha": {"grace_steps": 100, "reduction_factor": 2, "controls": 0.0},
    "variants": {
        "fast": {"optim.lr": 1e-2}, "slow": {"optim.lr": 1e-5},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "kills", "keys"),
    [
        ("driver", KILLS, {}),
        ("driver", -(-KILLS // 4), ASHA),
        ("raylet", KILLS, {}),
        ("gcs_server", -(-KILLS // 4), {}),
    ],
    ids=["driver", "driver-asha", "raylet", "gcs_server"],
)
def test_a_command_whose_process_was_killed_goes_on_when_given_again(
    kind, kills, keys, undisturbed, commands, counts, tmp_path
):
    still, rng = undisturbed(**keys), random.Random(f"{kind} {keys}")
    count = Count(kind + (" (asha)" if keys else ""))
    counts.append(count)
    while count.kills < kills:
        count.sweeps += 1
        results = tmp_path / f"results-{count.sweeps}"
        folder, killed_at = results / "tiny", None
        while True:
            count.commands += 1
            command = commands(still.sweep, results, tmp_path / f"out-{count.commands}.txt")
            before = attempts(folder)
            # One of two while it starts, the other while it trains.
            moment, training_for = math.inf, math.inf
            if count.kills < kills and rng.random() < 0.5:
                moment = command.began + rng.uniform(0.0, still.start_up_seconds)
            elif count.kills < kills:
                training_for = rng.uniform(0.0, 4.0)
            victim = None
            while not command.ended() and (time.monotonic() < moment or victim is None):
                if attempts(folder) > before:
                    moment = min(moment, time.monotonic() + training_for)
                    if killed_at is not None:
                        count.recovered.append(time.monotonic() - killed_at)
                        killed_at = None
                here = command.named(*ENDS[kind]) if ENDS[kind] else [command.process.pid]
                victim = here[0] if here else None
                time.sleep(0.05)
            if hit := not command.ended():
                starting, killed_at = attempts(folder) == before, time.monotonic()
                with contextlib.suppress(ProcessLookupError):  # it is just ending
                    os.kill(victim, signal.SIGKILL)
                wait_until(command.ended, seconds=20)
                if command.process.returncode != 0:
                    count.kills, count.starting = count.kills + 1, count.starting + starting
            if command.process.returncode == 0:
                break
            said = command.out.read_text()
            assert hit, said
            if REGISTERING in said:  # Ray's core ends the process before anything of ours can
                assert command.process.returncode == 1, said
            elif kind != "driver":
                assert command.process.returncode == 2, said
                last_line = said.splitlines()[-1]
                assert last_line.startswith(f"error: Ray's {kind} (process {victim}) has died: ")
            assert "Traceback" not in said
            assert "state-dump" not in said, "pages of Ray's own log"
            if rng.random() < 0.5:  # otherwise the next one meets trials that still train
                wait_until(lambda c=command: not any(t.startswith(TRIAL) for t in c.left()), 20)
                litter(folder)
        assert_equal(folder, still.folder)
        shown_as_they_are(str(folder))  # also what the killed commands have written
    assert count.kills == kills


@pytest.mark.parametrize(
    ("kind", "names", "runtime", "spread"),
    [
        ("trial", TRIAL, {}, 1.5),
        # There for a second or two where a trial begins: so little is there to make.
        ("data worker", WORKER, {"feed": "ray", "feed_cache": "none"}, 0.5),
    ],
    ids=["trial", "data_worker"],
)
def test_a_command_goes_on_by_itself_when_a_process_of_its_trials_is_killed(
    kind, names, runtime, spread, undisturbed, commands, counts, tmp_path
):
    # Fed in another way a trial leaves the same.
    still, rng, count = undisturbed(), random.Random(kind), Count(kind)
    counts.append(count)
    raw = yaml.safe_load(still.sweep.read_text())
    raw["runtime"] |= runtime
    sweep = tmp_path / "tiny.yaml"
    sweep.write_text(yaml.safe_dump(raw))
    while count.kills < KILLS:
        assert count.sweeps <= 2 * KILLS + 3, f"hardly a process is called {' or '.join(names)}"
        count.sweeps += 1
        count.commands += 1
        results = tmp_path / f"results-{count.sweeps}"
        folder, soon = results / "tiny", False
        command = commands(sweep, results, tmp_path / f"out-{count.commands}.txt")
        while count.kills < KILLS and not command.ended():
            # Three starts of a trial that got nowhere would end it: after a kill while it starts
            # let it train.
            if names == TRIAL and not soon:
                wait_until(lambda c=command, f=folder: c.ended() or has_gone_on(f))
            wait_until(lambda c=command: c.ended() or c.named(*names), step=0.005)
            time.sleep(rng.uniform(0.0, spread))
            if command.ended():
                break
            before, had, victims = attempts(folder), lines(folder), command.named(*names)
            if not victims or stat(victim := rng.choice(victims)) is None:
                continue
            os.kill(victim, signal.SIGKILL)
            count.kills += 1
            count.starting += names == TRIAL and victim not in training(folder)
            began, soon = time.monotonic(), not soon and rng.random() < 0.5
            if soon:
                continue
            goes_on = (
                (lambda f=folder, n=before: attempts(f) > n)
                if names == TRIAL
                else (lambda f=folder, n=had: lines(f) > n)
            )
            wait_until(lambda c=command, g=goes_on: c.ended() or g())
            count.recovered.append(time.monotonic() - began)
        assert command.wait() == 0, command.out.read_text()
        assert "Traceback" not in command.out.read_text()
        assert_equal(folder, still.folder)
    assert count.kills == KILLS
