"""Candidates in processes of their own, and the CPU time that is counted as theirs."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from bgray.bench_turns import Candidate, Link, Tree, _work, apart, spread
from bgray.config import ConfigError

BUSY = "import time\nwhile time.process_time() < {}: pass"


def spender(link):
    """Each turn a child of it works for so many seconds, and it waits for that."""
    link.answer("ready")
    while (seconds := link.next()) is not None:
        subprocess.run([sys.executable, "-c", BUSY.format(seconds)], check=True)
        link.answer(seconds)


def clumsy(link):
    raise ValueError("no such thing\nand much more of it")


def mortal(link):
    os._exit(7)


def test_the_time_of_a_candidates_children_is_its_own_also_once_they_have_ended():
    with Candidate("bench", "spender", spender) as one:
        assert one.ready == "ready"
        before = one.quiet(least=0.1)
        assert one.turn(0.4) == 0.4
        assert one.quiet(least=0.1) - before == pytest.approx(0.45, abs=0.12)


def test_a_childs_time_counts_while_it_runs_and_stays_when_nobody_waits_for_it():
    """As with Ray's workers: their parent lets the kernel clear them away."""
    code = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    code += "subprocess.Popen([sys.executable, '-c', sys.argv[1]])\ntime.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code, BUSY.format(0.4)])
    try:
        tree, deadline, peak, rested = Tree(parent.pid), time.monotonic() + 30, 0.0, 0
        busy = False
        while rested < 10 and time.monotonic() < deadline:
            busy |= tree.runnable()
            now = tree.seconds()
            assert now >= peak
            rested, peak = (rested + 1 if now == peak and peak > 0.3 else 0), now
            time.sleep(0.02)
        assert busy
        assert not tree.runnable()
        assert peak == pytest.approx(0.45, abs=0.15)
    finally:
        parent.kill()
        parent.wait()


def test_what_a_candidate_raises_is_one_line_with_its_name():
    spawn = multiprocessing.get_context("spawn")
    link = Link(spawn.Queue(), spawn.Queue())
    _work(clumsy, link, ())
    assert link.answers.get(timeout=5) == ("error", "ValueError: no such thing")
    one = Candidate("bench step", "clumsy", clumsy)
    one._link.answers.put(("error", "ValueError: no such thing"))
    with pytest.raises(ConfigError) as caught:
        one.turn(1)
    assert str(caught.value) == "bench step:\n  clumsy: ValueError: no such thing"


def test_a_candidate_that_died_is_not_waited_for():
    with (
        pytest.raises(ConfigError, match="its process ended with code 7"),
        Candidate("bench step", "mortal", mortal),
    ):
        pass


def test_rounds_that_overlap_are_not_apart():
    assert spread([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "least": 1.0,
        "most": 3.0,
        "rounds": [3.0, 1.0, 2.0],
    }
    assert apart([1.0, 2.0], [2.1, 5.0])
    assert apart([3.0, 4.0], [2.1, 2.9])
    assert not apart([1.0, 2.2], [2.1, 5.0])
