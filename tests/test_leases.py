import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cluster.s3_proxy import HOP_BY_HOP, Fault

from bgray import leases, storage
from bgray.config import ConfigError
from bgray.lease_files import Found, Local, Remote
from bgray.leases import Pace, held

FAST = Pace(beat_seconds=0.1, dead_seconds=0.6, poll_seconds=0.02, settle_seconds=0.2)
SLOW = Pace(beat_seconds=0.1, dead_seconds=60.0, poll_seconds=0.02, settle_seconds=0.2)
"""With which nothing is taken over for want of a heartbeat within a test."""
HOLDER = """
import sys, time
from bgray.leases import Pace, held
with held(sys.argv[1], print, "sweep kernels", Pace(0.1, 0.6, 0.02, 0.2)) as lease:
    print("held", flush=True)
    sys.stdin.readline()
    print(lease.lost(), flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path)


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds a folder until it reads a line."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def facts(folder):
    return json.loads(storage.read_bytes(storage.join(folder, leases.NAME)))


def wait_until(true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def leave(folder, **changes):
    """A lease as a process leaves it that is killed, with `changes`; by default its number is that
    of this process, which was started at another time than the lease says."""
    text = {"beat": 7, "token": "t" * 32, "what": "sweep kernels", **leases.here()}
    text |= {"pid": os.getpid(), "pid_started": "1", "started": "2026-01-02T03:04:05Z", **changes}
    storage.write_bytes(storage.join(folder, leases.NAME), json.dumps(text).encode())


def refused(folder, pace=SLOW, say=lambda text: None):
    with pytest.raises(ConfigError) as caught, held(folder, say, pace=pace):
        pass
    return str(caught.value)


# --- one holder


def test_the_file_says_who_holds_it_and_since_when_and_its_heartbeat_goes_on_until_it_is_deleted(
    root,
):
    with held(root, what="sweep kernels", pace=FAST) as lease:
        first = facts(root)
        assert (first["pid"], first["what"]) == (os.getpid(), "sweep kernels")
        assert first["host"] == os.uname().nodename
        assert abs(time.time() - time.mktime(time.strptime(first["started"][:10], "%Y-%m-%d"))) < (
            3 * 86400
        )
        wait_until(lambda: facts(root)["beat"] >= first["beat"] + 3)
        later = facts(root)
        assert later == {**first, "beat": later["beat"]}
        assert lease.lost() is None
    assert storage.listdir(root) == []
    with held(root, pace=FAST):  # and it can be had again
        pass
    if not storage.is_remote(root):
        assert os.listdir(root) == []  # nor is anything hidden left


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    with held(str(tmp_path / "a" / "b"), pace=FAST):
        assert os.listdir(tmp_path / "a" / "b") == ["lease.json"]


def test_an_error_gives_the_folder_back_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), held(str(tmp_path), pace=FAST):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_reading_a_lease_while_it_beats_never_sees_half_of_it(tmp_path):
    with held(str(tmp_path), pace=Pace(0.001, 1.0, 0.1, 0.1)):
        beats = [facts(str(tmp_path))["beat"] for _ in range(2000)]
    assert beats == sorted(beats)
    assert beats[-1] > 5


def test_a_fork_of_the_holder_does_not_give_the_folder_back(tmp_path):
    code = f"""
import os
from bgray.leases import held
with held({str(tmp_path)!r}):
    child = os.fork()
    if child == 0:
        raise SystemExit(3)  # leaves the with block in the child
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.listdir({str(tmp_path)!r}))
print(os.listdir({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3 ['lease.json']", "[]"]


# --- two


def test_a_second_process_is_refused_at_once_with_the_way_out(tmp_path, holder, capsys):
    from bgray.train import errors_in_one_line

    other = holder(str(tmp_path))
    began = time.monotonic()
    text = refused(str(tmp_path), say=pytest.fail)
    assert time.monotonic() - began < 10  # and not after the 30 s that a silent one is given
    since = facts(str(tmp_path))["started"]
    assert text == (
        f"{tmp_path}:\n  process {other.pid} on host {os.uname().nodename} has been running sweep "
        f"kernels since {since}; wait for it, stop it (Ctrl-C there), or write to another place "
        "with --set runtime.results=FOLDER"
    )
    with pytest.raises(SystemExit) as ended, errors_in_one_line(), held(str(tmp_path), pace=SLOW):
        pass
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {text}\n"
    print(*other.communicate("go\n"))
    with held(str(tmp_path), pytest.fail, pace=SLOW):
        pass


def test_the_same_process_does_not_get_it_twice_either(root):
    with held(root, what="sweep kernels", pace=SLOW):
        assert f"process {os.getpid()} on host" in refused(root)
        assert facts(root)["what"] == "sweep kernels"


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_process_killed_with_9_is_taken_over_at_once(tmp_path, holder, reaped):
    other, said = holder(str(tmp_path)), []
    other.kill()
    if reaped:
        other.wait()
    else:
        state = Path(f"/proc/{other.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
    began = time.monotonic()
    with held(str(tmp_path), said.append, pace=SLOW) as lease:
        assert time.monotonic() - began < 20  # and not after 60 s
        assert facts(str(tmp_path))["pid"] == os.getpid()
        assert lease.lost() is None
    host = os.uname().nodename
    assert said == [
        f"{tmp_path}: process {other.pid} on host {host} has ended without giving it back; "
        "taken over"
    ]


def test_a_number_that_was_given_to_another_process_since_is_not_taken_for_the_holder(root):
    leave(root)
    said = []
    with held(root, said.append, pace=SLOW):
        assert facts(root)["token"] != "t" * 32
    assert "has ended without giving it back; taken over" in said[0]


def suspend(process):
    """And wait until it is."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_suspended_holder_is_taken_over_when_its_heartbeat_has_stopped_and_learns_it(
    tmp_path, holder
):
    other, said = holder(str(tmp_path)), []
    suspend(other)
    began = time.monotonic()
    with held(str(tmp_path), said.append, pace=FAST) as lease:
        assert 0.6 <= time.monotonic() - began < 20
        ours = facts(str(tmp_path))["token"]
        other.stdin.write("go\n")
        other.stdin.flush()
        os.kill(other.pid, signal.SIGCONT)
        out, _ = other.communicate()  # it has ended, and given nothing back
        assert out.startswith(f"{tmp_path}: process {os.getpid()} on host ")
        assert out.endswith(" has taken it over; this one stops and writes nothing more\n")
        assert facts(str(tmp_path))["token"] == ours
        assert lease.lost() is None
    who = f"{tmp_path}: process {other.pid} on host {os.uname().nodename}"
    assert said == [
        f"{who} held it last and may still do so (it is suspended (Ctrl-Z?)); watching its "
        "heartbeat for up to 1 s",
        f"{who} has shown no heartbeat for 1 s; taken over",
    ]


def test_a_suspended_holder_that_goes_on_while_it_is_watched_keeps_it(tmp_path, holder):
    other = holder(str(tmp_path))
    suspend(other)

    def go_on(_text):
        os.kill(other.pid, signal.SIGCONT)

    assert f"process {other.pid} " in refused(str(tmp_path), say=go_on)


ELSEWHERE = {
    "that is another machine": {"host": "elsewhere"},
    "that may be another machine or container, or from before a restart": {"boot": "another"},
    "that may be another machine or container, or from before a restart ": {
        "pid_namespace": "pid:[1]"
    },
}


@pytest.mark.parametrize("why", ELSEWHERE)
def test_a_holder_that_cannot_be_looked_at_is_watched_and_taken_over_when_dead(root, why):
    leave(root, **ELSEWHERE[why], started="2099-01-01T00:00:00Z")  # nobody's clock is believed
    said, began = [], time.monotonic()
    with held(root, said.append, pace=FAST):
        assert 0.6 <= time.monotonic() - began < 20
    assert f"({why.strip()}); watching its heartbeat for up to 1 s" in said[0]
    assert "has shown no heartbeat for 1 s; taken over" in said[1]


def test_a_holder_on_another_machine_is_refused_as_soon_as_its_heartbeat_moves(root):
    leave(root, host="elsewhere", started="2026-01-02T03:04:05Z")
    said = []

    def say(text):
        said.append(text)
        threading.Timer(0.3, leave, [root], {"host": "elsewhere", "beat": 8}).start()

    began = time.monotonic()
    assert "on host elsewhere has been running sweep kernels since 2026-01-02T03:04:05Z" in refused(
        root, say=say
    )
    assert time.monotonic() - began < 20
    assert len(said) == 1


def test_a_watched_lease_that_is_given_back_is_had_at_once(root):
    leave(root, host="elsewhere")
    url = storage.join(root, leases.NAME)
    with held(root, lambda _: threading.Timer(0.2, storage.remove, [url]).start(), pace=SLOW):
        assert facts(root)["pid"] == os.getpid()


def test_a_damaged_lease_is_watched_and_then_taken_over(root):
    storage.write_bytes(storage.join(root, leases.NAME), b'{"beat": 3, "tok')
    said = []
    with held(root, said.append, pace=FAST):
        pass
    assert "another process held it last and may still do so (its lease.json is damaged)" in said[0]


def test_a_process_that_proc_hides_is_not_taken_for_gone(tmp_path, monkeypatch):
    def hidden(pid):
        raise FileNotFoundError

    monkeypatch.setattr(leases, "_stat", hidden)
    leave(str(tmp_path))
    said = []
    with held(str(tmp_path), said.append, pace=FAST):
        pass
    assert "(its process is hidden); watching its heartbeat" in said[0]
    leave(str(tmp_path), pid=2**22 + 1)  # beyond the largest number there can be
    with held(str(tmp_path), said.append, pace=SLOW):
        pass
    assert "has ended without giving it back" in said[2]


def test_what_others_left_long_ago_when_they_were_killed_in_a_write_is_cleared_away(tmp_path):
    for name in (".lease.json.abcdefgh", ".lease.json.ijklmnop", ".run.json.abcdefgh"):
        (tmp_path / name).write_text("x")
        if "ij" not in name:
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    with held(str(tmp_path), pace=FAST):
        pass
    assert sorted(os.listdir(tmp_path)) == [".lease.json.ijklmnop", ".run.json.abcdefgh"]


def test_of_many_processes_that_start_at_once_exactly_one_gets_it(tmp_path):
    several = 4
    folders = [str(tmp_path / str(i)) for i in range(24)]
    for folder in folders[::2]:
        leave(folder)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(several)
    racers = [
        spawn.Process(target=race, args=(folders, barrier, str(tmp_path / f"wins{i}")))
        for i in range(several)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    wins = [line for i in range(several) for line in (tmp_path / f"wins{i}").read_text().split()]
    assert sorted(wins, key=int) == [str(i) for i in range(len(folders))]
    assert all(os.listdir(folder) == [] for folder in folders)


def race(folders, barrier, log):
    """In each folder once: try to hold it, until all have tried."""
    with open(log, "w") as file:
        for i, folder in enumerate(folders):
            barrier.wait(60)
            with contextlib.ExitStack() as stack:
                try:
                    lease = stack.enter_context(held(folder, lambda _: None, pace=SLOW))
                except ConfigError:
                    lease = None
                barrier.wait(60)
                if lease is not None and lease.lost() is None:
                    print(i, file=file)
            barrier.wait(60)


def test_on_s3_of_several_that_start_at_once_exactly_one_gets_it(s3):
    for i in range(4):
        folder = storage.join(s3, str(i))
        if i % 2:
            leave(folder)
        assert compete(folder, 3) == 1


def compete(folder, several, pace=SLOW):
    """How many of so many threads hold it at one time; the others must have been refused."""
    barrier, lock, won, refusals, ends = threading.Barrier(several), threading.Lock(), [], [], []

    def one():
        barrier.wait()
        try:
            with held(folder, lambda _: None, pace=pace) as lease:
                barrier.wait()
                ends.append(lease.lost())
                with lock:
                    won.append(1)
        except ConfigError as error:
            refusals.append(error)
            barrier.wait()

    threads = [threading.Thread(target=one) for _ in range(several)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) + len(refusals) == several
    return ends.count(None)


def stores(root):
    url = storage.join(root, leases.NAME)
    return (Remote if storage.is_remote(root) else Local)(url, 0.1)


def test_a_lease_that_has_beaten_since_it_was_read_is_not_taken_over(root):
    holder, other = stores(root), stores(root)
    assert holder.put(b'{"beat":          0, "token": "a"}', None, '"a"')
    found = other.read()
    holder.beat(b'{"beat":          1, "token": "a"}', '"a"')
    assert not other.put(b'{"beat":          0, "token": "b"}', found, '"b"')
    assert other.read().raw == b'{"beat":          1, "token": "a"}'
    assert other.put(b'{"beat":          0, "token": "b"}', other.read(), '"b"')
    # Now the first one's heartbeat, and its giving back, must not touch the second one's.
    assert holder.beat(b'{"beat":          2, "token": "a"}', '"a"').raw == other.read().raw
    holder.remove('"a"')
    assert other.read().raw == b'{"beat":          0, "token": "b"}'


MOMENTS = {
    "before it looks": (os, "open"),
    "before it locks": (fcntl, "flock"),
    "before it writes": (os, "replace"),
}


def at(moment, monkeypatch, act):
    """Once, at that moment of what another does with the file, `act`."""
    where, name = MOMENTS[moment]
    original = getattr(where, name)

    def first(*args, **kwargs):
        monkeypatch.setattr(where, name, original)
        act()
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, first)


@pytest.mark.parametrize("moment", MOMENTS)
def test_whenever_a_second_one_takes_a_dead_lease_over_one_of_the_two_has_it(
    tmp_path, monkeypatch, moment
):
    url = str(tmp_path / "lease.json")
    storage.write_bytes(url, b"dead")
    one, two, had = Local(url, 0.0), Local(url, 0.0), {}
    dead = one.read()

    def second():
        had["two"] = two.put(b"two", dead, "two")

    at(moment, monkeypatch, second)
    had["one"] = one.put(b"one", dead, "one")
    assert sorted(had.values()) == [False, True]
    assert had[one.read().raw.decode()]


@pytest.mark.parametrize("moment", ["before it looks", "before it locks"])
def test_whenever_a_holder_is_taken_over_it_does_not_delete_the_others(
    tmp_path, monkeypatch, moment
):
    url = str(tmp_path / "lease.json")
    one, two = Local(url, 0.0), Local(url, 0.0)
    assert one.put(b"one", None, "one")
    at(moment, monkeypatch, lambda: two.put(b"two", Found(b"one"), "two"))
    one.remove("one")
    assert two.read().raw == b"two"


# --- a holder that loses it, or cannot say that it lives


@pytest.mark.parametrize("by", ["another", "nobody"])
def test_a_holder_learns_that_its_lease_was_replaced_or_deleted_and_leaves_what_is_there(root, by):
    with held(root, pace=FAST) as lease:
        if by == "another":
            leave(root, pid=77, host="elsewhere")
        else:
            storage.remove(storage.join(root, leases.NAME))
        if not storage.is_remote(root):
            assert lease.lost()  # at once
        wait_until(lease.lost)
        text = {
            "another": "process 77 on host elsewhere has taken it over",
            "nobody": "its lease.json is gone, removed by hand or by a process that took it over "
            "and has ended",
        }[by]
        assert lease.lost() == f"{root}: {text}; this one stops and writes nothing more"
    assert storage.listdir(root) == (["lease.json"] if by == "another" else [])


def test_after_a_sleep_of_the_machine_s3_is_asked_before_lost_says_no(s3, monkeypatch):
    with held(s3, pace=Pace(60.0, 60.0, 0.02, 0.2)) as lease:
        leave(s3, pid=77, host="elsewhere")
        assert lease.lost() is None  # no request: the last look was just now
        awake = leases._clock()
        monkeypatch.setattr(leases, "_clock", lambda: awake + 3600)
        assert "process 77 on host elsewhere has taken it over" in (lease.lost() or "")


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_goes_on_later(tmp_path, monkeypatch):
    said, pwrite = [], os.pwrite

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with held(str(tmp_path), said.append, pace=FAST) as lease:
        monkeypatch.setattr(os, "pwrite", full)
        wait_until(lambda: said)
        time.sleep(0.4)
        assert said == [
            f"cannot write the heartbeat {tmp_path}/lease.json (No space left on device); going on"
        ]
        stopped = facts(str(tmp_path))["beat"]
        monkeypatch.setattr(os, "pwrite", pwrite)
        wait_until(lambda: facts(str(tmp_path))["beat"] > stopped)
        assert lease.lost() is None
    assert len(said) == 1


@pytest.mark.parametrize("at", ["fsync", "write"])
def test_a_full_disk_names_the_lease_and_leaves_nothing(tmp_path, monkeypatch, at):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, at, full if at == "fsync" else lambda *_: 3)
    with pytest.raises(OSError, match="No space left on device") as caught:
        with held(str(tmp_path), pace=FAST):
            pass
    assert caught.value.filename == f"{tmp_path}/lease.json"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_the_leases_name():
    with pytest.raises(OSError, match=r"/proc/sweep/lease\.json") as caught:
        with held("/proc/sweep", pace=FAST):
            pass
    assert caught.value.filename == "/proc/sweep/lease.json"


# --- storage with less than it takes


@pytest.mark.parametrize("lacks", ["flock", "link"])
def test_without_locks_or_links_the_last_writer_has_it(tmp_path, monkeypatch, lacks):
    def lacking(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(*((fcntl, "flock") if lacks == "flock" else (os, "link")), lacking)
    folder = str(tmp_path / "folder")
    if lacks == "flock":
        leave(folder)
    assert compete(folder, 4) == 1
    assert os.listdir(folder) == []


def test_an_s3_server_that_ignores_conditions_is_noticed_and_the_last_writer_has_it(
    proxy, s3, monkeypatch
):
    ignored = HOP_BY_HOP | {"if-match", "if-none-match"}
    monkeypatch.setattr("cluster.s3_proxy.HOP_BY_HOP", ignored)
    pace = Pace(beat_seconds=5.0, dead_seconds=60.0, poll_seconds=0.02, settle_seconds=1.0)
    assert compete(storage.join(s3, "folder"), 3, pace) == 1
    holder, other = stores(s3), stores(s3)
    assert holder.put(b"a0", None, "a")
    assert holder.beat(b"a1", "a").raw == other.read().raw == b"a1"
    assert other.put(b"b0", other.read(), "b")
    assert holder.beat(b"a2", "a").raw == b"b0"
    holder.remove("a")
    assert other.read().raw == b"b0"
    other.remove("b")
    assert other.read() is None


def test_s3_that_is_away_for_a_while_costs_one_line_and_the_heartbeat_goes_on(proxy, s3):
    said = []
    with held(s3, said.append, pace=FAST) as lease:
        proxy.fault = Fault("503")
        wait_until(lambda: said)
        time.sleep(0.4)
        assert lease.lost() is None
        proxy.fault = None
        stopped = facts(s3)["beat"]
        wait_until(lambda: facts(s3)["beat"] > stopped)
        assert lease.lost() is None
    (line,) = said
    assert line.startswith(f"cannot write the heartbeat {s3}/lease.json (")
    assert storage.listdir(s3) == []


def test_a_heartbeat_whose_answer_is_lost_does_not_look_like_a_take_over(proxy, s3):
    store = Remote(storage.join(s3, leases.NAME), 0.1)
    assert store.put(b"a0", None, "a")
    version = store._version
    assert store.beat(b"a1", "a") == Found(b"a1", store._version)
    store._version = version  # as if the answer had not come
    assert store.beat(b"a2", "a").raw == b"a1"
    assert store.beat(b"a3", "a").raw == b"a3"


def test_a_heartbeat_on_s3_is_one_request(proxy, s3):
    store = Remote(storage.join(s3, leases.NAME), 0.1)
    assert store.put(b"a0", None, "a")
    proxy.requests.clear()
    store.beat(b"a1", "a")
    assert [request.split()[0] for request in proxy.requests] == ["PUT"]


def test_a_missing_bucket_is_an_error_with_its_name(s3):
    with pytest.raises(FileNotFoundError, match="bucket does not exist") as caught:
        with held("s3://no-such-bucket/sweep", pace=FAST):
            pass
    assert caught.value.filename == "s3://no-such-bucket/sweep/lease.json"


# --- after the end


def test_a_lease_is_forgotten_only_when_its_process_of_this_machine_is_dead(root):
    leave(root)
    leases.forget_dead(root)
    assert storage.listdir(root) == []
    leave(root, host="elsewhere")
    leases.forget_dead(root)
    assert storage.listdir(root) == ["lease.json"]
    storage.remove(storage.join(root, leases.NAME))
    with held(root, pace=SLOW):
        leases.forget_dead(root)
        assert storage.listdir(root) == ["lease.json"]
    leases.forget_dead(root)
