"""The cluster command: what it refuses, what it says, and how it comes back to a job."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bgray import cluster, fleet, fleet_state, jobs, remote, shipment
from bgray.problems import ConfigError
from bgray.remote import Cluster, Host, Unreachable

TOKEN = "5" * 64
OWN = {
    "cluster_name": "mine",
    "provider": {"type": "local", "head_ip": "10.0.0.5", "worker_ips": ["10.0.0.6"]},
    "auth": {"ssh_user": "ann", "ssh_private_key": "~/key"},
}
AWS = {
    "cluster_name": "cloud",
    "provider": {"type": "aws", "region": "us-west-2"},
    "auth": {"ssh_user": "ubuntu"},
    "available_node_types": {"head": {}, "cpu_worker": {}, "gpu_worker": {}},
    "head_node_type": "head",
}
QUICK = Path(__file__).parent.parent / "sweeps" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A HOME with a token in it, and nothing of this machine's own."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *jobs.PASSED_ON):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """No waiting between two looks."""
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)


def own():
    return Cluster("own.yaml", OWN)


def write(folder, raw):
    path = folder / "cluster.yaml"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return str(path)


def run(*argv):
    """(exit code, of the command in this process)"""
    with pytest.raises(SystemExit) as ended:
        cluster.main(list(argv))
    return ended.value.code


# --- a head to talk to


class FakeHead:
    """The part of Ray's jobs interface that is used; `script` is what befalls requests in turn."""

    def __init__(self):
        self.jobs, self.packages, self.environments = {}, {}, {}
        self.logs = {}
        self.posts = []
        self.script = []  # (status, text) or "cut" for coming answers of any request
        self.progress = lambda: None  # called before each look at a job
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                head.answer(self)

            do_POST = do_PUT = do_GET

            def log_message(self, format, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.opened = 0

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        status, found = 200, None
        if self.script:
            step = self.script.pop(0)
            if step == "cut":
                request.connection.close()
                return
            if step is not None:
                status, found = step
        if found is None:
            status, found = self.route(request, request.command, request.path, body)
        text = (found if isinstance(found, str) else json.dumps(found)).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            request.send_header("Content-Length", str(len(text)))
            request.end_headers()
            request.wfile.write(text)

    def route(self, request, method, path, body):
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 403, "Forbidden: Invalid authentication token"
        parts = path.strip("/").split("/")
        if parts[1] == "packages":
            if method == "PUT":
                self.packages[parts[-1]] = body
            return (200, "") if parts[-1] in self.packages else (404, "no such package")
        if method == "POST" and len(parts) == 2:
            asked = json.loads(body)
            self.posts.append(asked)
            name = asked["submission_id"]
            if name in self.jobs:
                return 500, f"ValueError: Job with submission_id {name} already exists"
            self.add(name, asked["metadata"], entrypoint=asked["entrypoint"])
            return 200, {"submission_id": name}
        if len(parts) == 2:
            return 200, list(self.jobs.values())
        self.progress()
        if parts[2] not in self.jobs:
            return 404, "Job does not exist"
        if parts[-1] == "logs":
            return 200, {"logs": self.logs[parts[2]]}
        if parts[-1] == "stop":
            self.jobs[parts[2]]["status"] = "STOPPED"
            return 200, {"stopped": True}
        return 200, self.jobs[parts[2]]

    def add(self, name, metadata, status="RUNNING", entrypoint="", logs=""):
        self.jobs[name] = {
            "submission_id": name,
            "status": status,
            "metadata": metadata,
            "entrypoint": entrypoint,
            "start_time": len(self.jobs) + 1,
            "message": "",
        }
        self.logs[name] = logs

    def open(self):
        self.opened += 1
        return FakeTunnel(self.port)


class FakeTunnel:
    def __init__(self, port):
        self.port, self.open = port, True

    def close(self):
        self.open = False


@pytest.fixture
def fake():
    made = FakeHead()
    yield made
    made.close()


@pytest.fixture
def head(fake):
    return jobs.Head("own.yaml", fake.open, TOKEN)


def spec(overrides=("runtime.results=/shared",)):
    return shipment.prepare(own(), str(QUICK), tuple(overrides))


# --- the file and the token


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "is this a cluster's YAML"),
        ({"kind": "RayJob"}, "kubectl create"),
        ({"cluster_name": "x"}, "there is aws and local, got None"),
        ({"cluster_name": "x", "provider": {"type": "gcp"}}, "there is aws and local, got 'gcp'"),
        ({"cluster_name": "x", "provider": {"type": "local"}}, "provider.worker_ips: missing"),
        ({"cluster_name": "x", "provider": {"type": "aws"}}, "provider.region: missing"),
    ],
)
def test_a_file_that_is_no_cluster_is_refused_with_the_reason(tmp_path, raw, says):
    with pytest.raises(ConfigError, match="cluster.yaml") as refused:
        remote.read_cluster(write(tmp_path, raw))
    assert says in str(refused.value)


def test_without_a_token_nothing_is_submitted_and_the_way_to_make_one_is_said(
    home, tmp_path, capsys
):
    (home / ".ray" / "auth_token").write_text("\n")
    assert run("submit", write(tmp_path, OWN), str(QUICK), "--set", "runtime.results=/x") == 2
    assert "ray get-auth-token --generate" in capsys.readouterr().err


def test_the_token_is_looked_for_where_ray_looks(tmp_path, monkeypatch):
    assert remote.auth_token() == TOKEN
    (tmp_path / "other").write_text("abc\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert remote.auth_token() == "abc"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert remote.auth_token() == "def"


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_not_the_clusters_is_said_to_be_that(fake, status):
    fake.script = [(status, "Forbidden: Invalid authentication token")]
    with pytest.raises(ConfigError, match="started with another one"):
        jobs.Head("own.yaml", fake.open, "bad").jobs()


# --- what is shipped


@pytest.mark.parametrize("path", ["results", "./results", "~/results", "../x"])
def test_results_that_only_one_machine_has_are_refused(path):
    with pytest.raises(ConfigError, match=r"runtime.results: .*folder of one machine"):
        spec([f"runtime.results={path}"])


def test_a_cache_or_data_of_one_machine_is_refused_too():
    with pytest.raises(ConfigError, match=r"runtime.cache: 'data' is a folder of one machine"):
        spec(["runtime.results=/shared", "runtime.cache=data"])
    with pytest.raises(ConfigError, match=r"data.path: 'data/music' is a folder of one machine"):
        spec(["runtime.results=/shared", "data.path=data/music"])


def test_built_in_music_is_cached_beside_the_results():
    assert "runtime.cache=s3://b/p/.cache" in spec(["runtime.results=s3://b/p"]).overrides
    given = spec(["runtime.results=/shared", "runtime.cache=/mnt/cache"]).overrides
    assert [item for item in given if "cache" in item] == ["runtime.cache=/mnt/cache"]


def test_data_goes_to_the_cpu_nodes_where_the_cluster_has_such_a_type():
    made = shipment.prepare(Cluster("aws.yaml", AWS), str(QUICK), ("runtime.results=/shared",))
    assert "runtime.data_nodes=cpu_worker" in made.overrides
    assert not any("data_nodes" in item for item in spec().overrides)
    said = ("runtime.results=/shared", "runtime.data_nodes=any")
    made = shipment.prepare(Cluster("aws.yaml", AWS), str(QUICK), said)
    assert "runtime.data_nodes=cpu_worker" not in made.overrides


def test_a_mistake_in_the_sweep_is_found_before_anything_is_asked_of_the_cluster(tmp_path, capsys):
    file = write(tmp_path, OWN)  # nothing answers at its addresses
    wrong = ["--set", "runtime.results=/x", "--set", "train.stesp=1", "--set", "train.steps=0"]
    assert run("submit", file, str(QUICK), *wrong) == 2
    said = capsys.readouterr().err
    assert "did you mean 'steps'" in said
    assert "train.steps: must be >= 1" in said


def test_data_that_cannot_be_reached_from_here_is_noted_and_the_rest_checked():
    made = spec(["runtime.results=/shared", "data.path=/only/there"])
    assert any("/only/there cannot be reached from here" in note for note in made.notes)
    assert made.notes[0].startswith("3 trials")
    with pytest.raises(ConfigError, match="did you mean 'kernels'"):
        spec(["runtime.results=/shared", "data.path=/only/there", "model.kernel=[3]"])


def test_an_oracle_question_is_shipped_with_its_own_results(tmp_path):
    file = str(QUICK.parent / "oracle.yaml")
    with pytest.raises(ConfigError, match="oracle.results: .*folder of one machine"):
        shipment.prepare(own(), file, ())
    made = shipment.prepare(own(), file, ("oracle.results=s3://b/p",))
    assert made.notes == (f"results: s3://b/p/{made.name}",)


def test_the_package_is_the_sweeps_file_alone_and_equal_files_are_one_package(tmp_path):
    name, data = spec().package()
    (tmp_path / "p.zip").write_bytes(data)
    listed = subprocess.check_output([sys.executable, "-m", "zipfile", "-l", tmp_path / "p.zip"])
    assert [line.split()[0] for line in listed.decode().splitlines()[1:]] == ["quickstart.yaml"]
    time.sleep(0.01)
    assert spec().package() == (name, data)


def test_the_entrypoint_survives_a_shell_whatever_the_values_are(tmp_path):
    made = shipment.Spec("x", "a b.yaml", ("name=it's", "model.kernels=[7, 23]", "x=$(id)"))
    words = made.entrypoint.replace("exec python", "printf '%s\\n'", 1)
    out = subprocess.check_output(["sh", "-c", words], text=True).splitlines()
    assert out[2] == "a b.yaml"
    assert out[3:] == ["--set", "name=it's", "--set", "model.kernels=[7, 23]", "--set", "x=$(id)"]


# --- submit


def test_a_new_job_gets_the_sweep_its_settings_and_no_credentials(head, fake, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    said = []
    assert jobs.submit(head, spec(), said.append) == "quickstart-1"
    (post,) = fake.posts
    assert post["entrypoint"].startswith("exec python -m bgray.sweep quickstart.yaml --set ")
    assert post["entrypoint_num_cpus"] == 0
    assert post["runtime_env"]["env_vars"] == {"AWS_ENDPOINT_URL": "http://minio:9000"}
    assert post["runtime_env"]["working_dir"] == f"gcs://{spec().package()[0]}"
    assert fake.packages == {spec().package()[0]: spec().package()[1]}
    assert said == ["job quickstart-1 started"]


def test_submitting_again_comes_back_to_the_job_that_runs(head, fake):
    jobs.submit(head, spec(), print)
    assert jobs.submit(head, spec(), print) == "quickstart-1"
    assert len(fake.posts) == 1
    fake.jobs["quickstart-1"]["status"] = "SUCCEEDED"
    assert jobs.submit(head, spec(), print) == "quickstart-2"


def test_a_running_job_with_other_settings_is_not_taken_for_the_same(head, fake):
    jobs.submit(head, spec(), print)
    other = spec(["runtime.results=/shared", "train.steps=200"])
    with pytest.raises(ConfigError, match=r"runs already as job quickstart-1 with other settings"):
        jobs.submit(head, other, print)


def test_a_start_whose_answer_is_lost_does_not_start_a_second_job(head, fake, quick):
    real, lost = fake.route, []

    def route(request, method, path, body):
        status, found = real(request, method, path, body)
        if method == "POST" and not lost:  # it is done, but the answer says otherwise
            lost.append(path)
            return 500, "Timed out"
        return status, found

    fake.route = route
    assert jobs.submit(head, spec(), print) == "quickstart-1"
    assert len(fake.posts) == 1


def test_a_job_of_others_that_has_the_id_already_is_not_ours(head, fake):
    fake.add("quickstart-1", None)
    assert not jobs._start(head, spec(), "quickstart-1", {})
    assert jobs.submit(head, spec(), print) == "quickstart-2"


def test_of_two_submits_at_a_time_the_second_follows_the_first(head, fake):
    """Both have seen no job; the second one's id is taken when it asks."""
    mine = spec()
    fake.add("quickstart-1", {"bgray_sweep": "quickstart", "bgray_digest": mine.digest})
    assert jobs._start(head, mine, "quickstart-1", {})
    other = spec(["runtime.results=/shared", "train.steps=200"])
    assert not jobs._start(head, other, "quickstart-1", {})


def test_a_dashboard_that_is_still_starting_is_waited_for(head, fake, quick):
    fake.script = [(500, "No available agent to submit job"), "cut"]
    said = []
    assert jobs.submit(head, spec(), said.append) == "quickstart-1"
    assert said == ["No available agent to submit job; trying again", "job quickstart-1 started"]
    assert fake.opened == 3  # each time by a new tunnel


def test_code_that_the_cluster_does_not_have_is_said(monkeypatch):
    said, there = [], subprocess.check_output(
        [sys.executable, "-m", "bgray.cluster", "code"], text=True
    )  # fmt: skip
    for text in (there, "0123456789abcdef\n", ""):
        done = subprocess.CompletedProcess([], 0, text, "")
        monkeypatch.setattr(Host, "run", lambda *args, done=done: done)
        monkeypatch.setattr("bgray.provenance.git", lambda: {"commit": "abc", "new_files": ["x"]})
        told = jobs.warn_of_other_code(own(), said.append)
        same = {"BGRAY_COMMIT": "abc and uncommitted changes"}
        assert told == (same if text == there else {})
    assert len(said) == 1
    assert "`ray up own.yaml` brings it there" in said[0]


# --- follow


def follow(head, name="s-1"):
    out, said = [], []
    code = jobs.follow(head, name, out.append, said.append)
    return code, "".join(out), said


def growing(fake, texts, status="SUCCEEDED", **facts):
    """The job's log is one text longer at each look; then it has ended."""
    fake.add("s-1", {"bgray_sweep": "s"})
    texts = list(texts)

    def progress():
        if texts:
            fake.logs["s-1"] += texts.pop(0)
        else:
            fake.jobs["s-1"].update(status=status, **facts)

    fake.progress = progress


@pytest.mark.parametrize(
    ("status", "facts", "code", "says"),
    [
        ("SUCCEEDED", {"driver_exit_code": 0}, 0, "is done"),
        ("FAILED", {"driver_exit_code": 1, "message": "exit code 1, last available logs"}, 1, "1"),
        ("FAILED", {"driver_exit_code": 2}, 2, "failed"),
        ("FAILED", {"driver_exit_code": 130}, 130, "was stopped"),
        ("FAILED", {"driver_exit_code": None, "message": "no package\nx"}, 1, ": no package"),
        ("STOPPED", {}, 130, "was stopped"),
    ],
)
def test_the_exit_code_is_the_jobs_outcome(head, fake, quick, status, facts, code, says):
    growing(fake, ["a\n", "b\nc"], status, **facts)
    ended, out, said = follow(head)
    assert ended == code
    assert out == "a\nb\nc"  # also the line that was not ended
    assert says in said[-1]
    assert "last available logs" not in said[-1]


def test_a_dropped_connection_is_said_once_and_no_line_is_lost_or_doubled(head, fake, quick):
    growing(fake, [f"line {i}\n" for i in range(20)])
    fake.script = [None] * 5 + ["cut", (502, "Bad gateway"), "cut"] + [None] * 9 + ["cut"]
    code, out, said = follow(head)
    assert code == 0
    assert out == "".join(f"line {i}\n" for i in range(20))
    assert [text.split("; ")[-1] for text in said if "come back" in text] == [
        "the job goes on, trying to come back to it (Ctrl-C leaves)"
    ] * 2
    assert len([text for text in said if text.startswith("back after")]) == 2


def test_a_tunnel_that_died_between_two_looks_is_opened_again(head, fake, quick):
    growing(fake, ["a\n", "b\n", "c\n"])
    head.call("GET", "/api/jobs/")
    head._tunnel.open = False
    code, out, _ = follow(head)
    assert (code, out, fake.opened) == (0, "a\nb\nc\n", 2)


def test_a_job_that_a_new_head_does_not_know_is_said_to_be_gone(head, fake):
    code, _, said = follow(head)
    assert code == 1
    assert "started anew" in said[0]
    assert "submit" in said[0]


def test_a_head_that_the_cloud_denies_for_a_minute_is_given_up(fake, quick, monkeypatch):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(jobs.time, "monotonic", lambda: float(next(clock)))

    def gone():
        raise jobs.Gone("no head of 'cloud' runs")

    code, _, said = follow(jobs.Head("aws.yaml", gone, TOKEN))
    assert code == 1
    assert said[-1].startswith("no head of 'cloud' runs any more; `ray up` and `submit` again")


FOLLOW = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever `nohup` and `&` left of them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from bgray import cluster, jobs, remote, shipment
class Tunnel:
    port, open = int(sys.argv[1]), True
    def __init__(self, host): pass
    def close(self): pass
jobs.Tunnel = Tunnel
jobs.warn_of_other_code = lambda *args: {}
cluster.main(["submit", *sys.argv[2:], "--set", "runtime.results=/x"])
"""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_leaving_leaves_the_job_and_says_how_to_come_back(tmp_path, fake, sig):
    argv = [sys.executable, "-c", FOLLOW, str(fake.port), write(tmp_path, OWN), str(QUICK)]
    argv += ["--set", "model.blocks=[1, 1, 2]"]
    looked = threading.Event()
    fake.progress = looked.set
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "started" in line:
                break
        assert looked.wait(60)  # it follows the job by now
        process.send_signal(sig)
        said = process.stdout.read()
    assert process.returncode == 130
    assert "left; job quickstart-1 goes on" in said
    [again] = [line.split("come back: ")[1] for line in said.splitlines() if "come back: " in line]
    words = [*argv[4:], "--set", "runtime.results=/x"]
    assert shlex.split(again) == ["python", "-m", "bgray.cluster", "submit", *words]
    assert fake.jobs["quickstart-1"]["status"] == "RUNNING"


# --- stop


def test_stop_ends_the_sweeps_job_and_no_other(head, fake):
    fake.add("a-1", {"bgray_sweep": "a"})
    fake.add("b-1", {"bgray_sweep": "b"})
    fake.add("theirs", {})
    said = []
    assert jobs.stop(head, "a", said.append)
    assert {name: job["status"] for name, job in fake.jobs.items()} == {
        "a-1": "STOPPED", "b-1": "RUNNING", "theirs": "RUNNING",
    }  # fmt: skip
    assert "is stopped" in said[-1]
    assert not jobs.stop(head, "a", said.append)


# --- wait


def known(nodes=(), pending=(), failed=(), asked=(), log=()):
    return {
        "nodes": [{"head": True, "types": ["head"]}, *nodes],
        "pending": [{"type": kind, "what": what} for kind, what in pending],
        "failed": [{"type": kind, "reason": reason} for kind, reason in failed],
        "asked": list(asked),
        "log": list(log),
    }


def node(*types):
    return {"head": False, "types": list(types)}


def waited(monkeypatch, states, kind="gpu_worker", count=1, seconds=60.0, raw=AWS):
    """(whether they came, what was said) for what the head answers in turn."""
    states, now, said = list(states), [0.0], []

    def look(_):
        found = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(fleet, "_look", look)
    monkeypatch.setattr(fleet.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(fleet.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    came = fleet.wait(Cluster("c.yaml", raw), kind, count, seconds, said.append)
    return came, said


def test_wait_says_each_change_once_and_ends_when_they_are_there(monkeypatch):
    pending = known(pending=[("gpu_worker", "starting")])
    there = known(nodes=[node("gpu_worker"), node("cpu_worker")])
    came, said = waited(monkeypatch, [known(), known(), pending, pending, there])
    assert came
    assert [line.split("gpu_worker: ")[1] for line in said] == [
        "0 of 1 joined", "0 of 1 joined; starting", "1 of 1 joined",
    ]  # fmt: skip


def test_only_nodes_of_the_type_count_and_never_the_head(monkeypatch):
    states = [known(nodes=[node("cpu_worker")])]
    assert not waited(monkeypatch, states, "gpu_worker")[0]
    assert waited(monkeypatch, states, "cpu_worker")[0]
    assert waited(monkeypatch, states, "")[0]
    assert not waited(monkeypatch, [known()], "")[0]


def test_no_capacity_is_waited_out_and_told_at_the_time_out(monkeypatch):
    full = known(
        failed=[("gpu_worker", "(InsufficientInstanceCapacity): none here")], asked=[{"GPU": 1}]
    )
    came, said = waited(monkeypatch, [full], seconds=60)
    assert not came
    assert "InsufficientInstanceCapacity" in said[0]
    assert said[1] == "gpu_worker: 0 of 1 after 64 s"


@pytest.mark.parametrize(
    "wrong",
    [
        "(InvalidParameterValue): Invalid IAM Instance Profile name",
        "(AuthFailure.ServiceLinkedRoleCreationNotPermitted): no role for spot",
    ],
)
def test_a_request_that_will_never_do_ends_the_wait_at_once(monkeypatch, wrong):
    broken = known(pending=[("gpu_worker", "1 requested")], failed=[("gpu_worker", wrong)])
    came, said = waited(monkeypatch, [broken])
    assert not came
    assert said[-2] == f"gpu_worker: 0 of 1 after 0 s; hopeless: {wrong}"


def test_a_failed_set_up_that_is_not_tried_again_ends_the_wait_early(monkeypatch):
    stuck = known(
        pending=[("local.cluster.node", "10.0.0.6: uninitialized")],
        log=["mkdir: cannot create directory", "NodeUpdater: 10.0.0.6: Setup commands failed"],
    )
    came, said = waited(monkeypatch, [stuck], kind="", seconds=900, raw=OWN)
    assert not came
    assert "after 48 s; hopeless: NodeUpdater: 10.0.0.6: Setup commands failed" in said[1]
    assert "  mkdir: cannot create directory" in said


def test_nodes_that_nobody_asks_for_are_said_to_be_that(monkeypatch):
    assert "nothing asks for one" in waited(monkeypatch, [known()])[1][-1]
    asked = waited(monkeypatch, [known(asked=[{"GPU": 1}])])[1]
    assert "nothing asks for one" not in asked[-1]


def test_a_head_that_does_not_answer_is_waited_for(monkeypatch):
    there = known(nodes=[node("gpu_worker")])
    came, said = waited(monkeypatch, [Unreachable("10.0.0.5: Connection refused"), there])
    assert came
    assert said[0].endswith("gpu_worker: 10.0.0.5: Connection refused")


def test_an_unknown_node_type_is_refused_with_the_nearest(tmp_path, capsys):
    assert run("wait", write(tmp_path, AWS), "--type", "gpu_workr") == 2
    assert "did you mean 'gpu_worker'" in capsys.readouterr().err


def test_the_log_is_read_for_trouble_and_for_why_a_launch_failed(tmp_path):
    (tmp_path / "monitor.log").write_text(
        "2026-11-21 08:42:00,100\tINFO node_provider.py:491 -- Failed to launch 1 nodes of type "
        "old: Node Launch Exception (Old): long ago\n"
        "2026-11-21 08:43:42,895\tINFO node_provider.py:491 -- Failed to launch 1 nodes of type "
        "gpu_worker: Node Launch Exception (InsufficientInstanceCapacity): none here\n"
        "2026-11-21 08:43:47,895\tINFO node_provider.py:491 -- Failed to launch 1 nodes of type "
        "gpu_worker: Node Launch Exception (InsufficientInstanceCapacity): none here\n"
        "Recent failures:\n (no failures)\n"
    )
    (tmp_path / "monitor.out").write_text("\x1b[31mbgray setup on w1: uv failed\x1b[0m\nfine\n")
    found = fleet_state.launch_failures(tmp_path, datetime(2026, 11, 21, 8, 44))
    assert found == {"gpu_worker": "(InsufficientInstanceCapacity): none here"}
    lines = fleet_state.complaints(tmp_path)
    assert len([line for line in lines if "gpu_worker" in line]) == 1
    assert lines[-1] == "bgray setup on w1: uv failed"
    assert not any("Recent" in line or "no failures" in line for line in lines)


# --- down


@pytest.fixture
def ec2(monkeypatch):
    """EC2 in this process, with a head and two workers of the cluster, and another's."""
    moto = pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with moto.mock_aws():
        client = remote.ec2(Cluster("c.yaml", AWS))

        def start(name, kind, node_type):
            tags = {
                "ray-cluster-name": name,
                "ray-node-type": kind,
                "ray-user-node-type": node_type,
            }
            made = client.run_instances(
                ImageId="ami-12c6146b", InstanceType="t3.small", KeyName="pair", MinCount=1,
                MaxCount=1, TagSpecifications=[{
                    "ResourceType": "instance",
                    "Tags": [{"Key": k, "Value": v} for k, v in tags.items()],
                }],
            )  # fmt: skip
            return made["Instances"][0]["InstanceId"]

        client.start = start
        start("cloud", "head", "head")
        start("cloud", "worker", "gpu_worker")
        start("theirs", "head", "head")
        yield client


@pytest.fixture
def no_ray_down(monkeypatch):
    """`ray down` that could not do its work."""
    failed = subprocess.CompletedProcess([], 1, stdout="\x1b[31mno route to host\x1b[0m\n")
    monkeypatch.setattr(fleet.subprocess, "run", lambda *a, **k: failed)
    monkeypatch.setattr(fleet.time, "sleep", lambda seconds: None)


def test_the_head_is_found_by_its_tags_and_the_key_by_the_pairs_name(ec2, home):
    host = remote.head(Cluster("c.yaml", AWS))
    assert host is not None
    assert (host.user, host.key) == ("ubuntu", str(home / ".ssh" / "pair.pem"))
    inside = {**AWS, "provider": {**AWS["provider"], "use_internal_ips": True}}
    assert remote.head(Cluster("c.yaml", inside)).address != host.address  # type: ignore
    with pytest.raises(ConfigError, match=r"no head of 'other' runs .*`ray up c.yaml` starts one"):
        remote.head_or_refuse(Cluster("c.yaml", {**AWS, "cluster_name": "other"}))


def test_down_ends_what_ray_down_left_and_nothing_of_others(ec2, no_ray_down):
    said = []
    assert fleet.down(Cluster("c.yaml", AWS), said.append)
    assert "ray down failed (exit code 1): no route to host; going on without it" in said
    assert len([line for line in said if line.startswith("terminating i-")]) == 2
    assert said[-1] == "nothing is left"
    assert not remote.instances(Cluster("c.yaml", AWS))
    assert len(remote.instances(Cluster("c.yaml", {**AWS, "cluster_name": "theirs"}))) == 1


def test_an_instance_that_appears_late_is_ended_too(ec2, no_ray_down, monkeypatch):
    real, looks = remote.instances, []

    def instances(*args):
        looks.append(1)
        if len(looks) == 4:  # the head's autoscaler had asked for it just before it went
            ec2.start("cloud", "worker", "cpu_worker")
        return real(*args)

    monkeypatch.setattr(remote, "instances", instances)
    said = []
    assert fleet.down(Cluster("c.yaml", AWS), said.append)
    assert any("cpu_worker" in line for line in said if line.startswith("terminating"))
    assert not real(Cluster("c.yaml", AWS))


def test_what_cannot_be_ended_is_listed_by_id_and_the_exit_code_says_so(
    ec2, no_ray_down, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(fleet, "_terminate", lambda *args: None)
    clock = iter(range(0, 100_000, 60))
    monkeypatch.setattr(fleet.time, "monotonic", lambda: float(next(clock)))
    ids = [i["InstanceId"] for i in remote.instances(Cluster("c.yaml", AWS))]
    assert run("down", "-y", write(tmp_path, AWS)) == 1
    out = capsys.readouterr().out
    assert all(f"  {name} (" in out for name in ids)
    assert "2 left: see to it" in out


def test_own_machines_that_do_not_answer_or_still_run_ray_are_named(monkeypatch, no_ray_down):
    running = {"10.0.0.5": [[]], "10.0.0.6": [["77 ray::IDLE"]] * 20}

    def run(host, command, seconds=60):
        if host.address == "10.0.0.7":
            raise Unreachable("10.0.0.7: Connection timed out")
        lines = []
        if command.startswith("pgrep"):
            lines = running[host.address].pop(0)
        return subprocess.CompletedProcess([], 0, "\n".join(lines), "")

    monkeypatch.setattr(Host, "run", run)
    provider = {**OWN["provider"], "worker_ips": ["10.0.0.6", "10.0.0.7"]}
    said = []
    assert not fleet.down(Cluster("c.yaml", {**OWN, "provider": provider}), said.append)
    assert "10.0.0.5: nothing runs" in said
    assert "  10.0.0.6: pid 77 ray::IDLE" in said
    assert "  10.0.0.7: Connection timed out: could not look there" in said
    assert said[-1] == "2 left: see to it"


def test_the_search_for_leftovers_finds_rays_processes_and_not_itself(tmp_path):
    """By a process of our own that only has the name."""
    argv = ["bash", "-c", "exec -a /x/core/src/ray/raylet/raylet sleep 60"]
    with subprocess.Popen(argv) as process:
        try:
            while b"raylet" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                time.sleep(0.01)
            found = subprocess.check_output(["bash", "-c", fleet.LOOK], text=True).splitlines()
        finally:
            process.kill()
    assert f"{process.pid} /x/core/src/ray/raylet/raylet 60" in found
    assert not any("pgrep" in line for line in found)


def test_down_without_a_terminal_needs_a_yes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "_running", lambda _: ["runs: kernels-1"])
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert run("down", write(tmp_path, OWN)) == 2
    said = capsys.readouterr()
    assert "runs: kernels-1" in said.out
    assert "every Ray process of this user on 10.0.0.5, 10.0.0.6" in said.out
    assert "-y says yes" in said.err


def test_down_shows_whose_machines_would_end_before_it_asks(ec2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "_running", lambda _: [])
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    there = remote.instances(Cluster("c.yaml", AWS))
    assert run("down", write(tmp_path, AWS)) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ends: ")]
    assert lines == [
        f"ends: {i['InstanceId']} ({i['Type']}, t3.small, running), "
        f"launched {i['LaunchTime']:%Y-%m-%d %H:%M} UTC with the key pair"
        for i in there
    ]
    assert len(lines) == 2
    assert len(remote.instances(Cluster("c.yaml", AWS))) == 2


# --- ssh


def test_ssh_uses_the_files_user_key_and_proxy_and_never_asks(home):
    raw = {**OWN, "auth": {**OWN["auth"], "ssh_proxy_command": "ssh -W %h:%p gate"}}
    host = remote.head(Cluster("c.yaml", raw))
    assert host is not None
    line = host.ssh("-L", "1:2:3")
    assert line[-1] == "10.0.0.5"
    assert line[line.index("-i") + 1] == str(home / "key")
    assert line[line.index("-l") + 1] == "ann"
    assert "ProxyCommand=ssh -W %h:%p gate" in line
    assert {"BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=5"} <= set(line)


def fake_ssh(folder, monkeypatch, script):
    path = folder / "bin" / "ssh"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


LISTEN = """
import socket, sys
port = int(sys.argv[sys.argv.index("-L") + 1].split(":")[1])
server = socket.create_server(("127.0.0.1", port))
sys.stdin.read()
"""


def test_a_tunnel_listens_here_and_ends_with_us(tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, LISTEN)
    tunnel = remote.Tunnel(Host("10.0.0.5"))
    assert tunnel.open
    tunnel.close()
    assert not tunnel.open
    # Killed with -9, a process cannot close anything: the tunnel sees its input end.
    script = "import os, signal; from bgray.remote import Host, Tunnel; t = Tunnel(Host('x'));"
    script += "print(t._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    pid = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True).stdout
    end = time.monotonic() + 10
    while Path(f"/proc/{pid.strip()}/fd").exists() and time.monotonic() < end:
        with contextlib.suppress(OSError):
            if "zombie" in Path(f"/proc/{pid.strip()}/status").read_text():
                break
        time.sleep(0.05)
    assert time.monotonic() < end


def test_a_tunnel_that_ssh_refuses_says_what_ssh_said(tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, "import sys; sys.exit('Permission denied (publickey).')")
    with pytest.raises(Unreachable, match=r"10.0.0.5: Permission denied \(publickey\)"):
        remote.Tunnel(Host("10.0.0.5"))
