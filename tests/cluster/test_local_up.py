"""`ray up cluster/local.yaml` for real, on hosts made of namespaces: train, lose a machine, end."""

import re
import shutil
import time

import pytest
import yaml

from bgray.records import read_info, read_lines, runs

from .lab import SHARED

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

FILE = "cluster/local.yaml"
HEAD, WORKERS = "10.77.0.10", ("10.77.0.11", "10.77.0.12", "10.77.0.13")


@pytest.fixture
def machines(lab, shards_url):
    """(laptop, head, workers): the project's own local.yaml with these machines' addresses."""
    shutil.copytree(shards_url, lab.shared / "shards")
    laptop = lab.laptop()
    head = lab.host("head", HEAD)
    offers = {"BGRAY_RAY_ARGS": "--num-cpus=2 --num-gpus=0 --object-store-memory=200000000"}
    workers = [lab.host(f"w{i}", ip, env=offers) for i, ip in enumerate(WORKERS)]
    path = laptop.root / "project" / FILE
    text = path.read_text()
    text = text.replace("192.0.2.10", HEAD)
    path.write_text(text.replace("[192.0.2.11, 192.0.2.12]", f"[{', '.join(WORKERS)}]"))
    return laptop, head, workers


@pytest.fixture
def write_sweep(tiny, machines):
    laptop = machines[0]

    def write(name, steps, *, runtime=None, **keys):
        raw = {**tiny, "name": name, "optim": {"name": "adamw", "lr": 1e-3}, **keys}
        raw["data"]["path"] = f"{SHARED}/shards"
        raw["train"]["steps"] = steps
        raw["validation"]["every"] = steps // 4
        raw["runtime"] = {
            "results": f"{SHARED}/results",
            "checkpoint_every": steps // 8,
            "log_every": 10,
            "cpus": 1,
            "threads": 1,
            "feed": "process",
            **(runtime or {}),
        }
        (laptop.root / "project" / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        return f"sweeps/{name}.yaml"

    return write


def bgray(laptop, command, **options):
    return laptop.run(f"cd project && python -m bgray.cluster {command}", **options)


def until(condition, seconds, process=None):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.2)
    return found


def steps_of(folder):
    """The furthest checkpoint that any run of a sweep has."""
    found = [re.search(r"\d+", path.name) for path in folder.glob("*/checkpoint/step-*.pt")]
    return max((int(number.group()) for number in found if number), default=0)


def processes_of_ray(host):
    """What is left of it; the autoscaler's connections to its workers are given the 10 s for which
    ssh keeps them open (ControlPersist)."""
    end = time.monotonic() + 60
    while True:
        found = [item for item in host.processes() if re.search(r"ray|bgray|gcs_server", item[1])]
        only_connections = found and all("[mux]" in line for _, line in found)
        if not only_connections or time.monotonic() > end:
            return found
        time.sleep(0.5)


def test_own_machines_come_up_train_lose_one_go_on_stop_and_go_down(
    lab, machines, write_sweep, capsys
):
    laptop, head, workers = machines
    clock = [time.monotonic()]

    def took(what):
        clock.append(time.monotonic())
        with capsys.disabled():
            print(f"\n  {what}: {clock[-1] - clock[-2]:.0f} s", end="")

    assert bgray(laptop, f"check {FILE}").returncode == 0
    took("check")
    laptop.run(f"cd project && ray up -y {FILE}", timeout=240)
    took("ray up")
    bgray(laptop, f"wait {FILE} --count 3 --timeout 240", timeout=260)
    took("all workers joined")

    # An unbroken DDP run, to compare with.
    results = lab.shared / "results"
    ddp = write_sweep("ddp", 480, runtime={"workers": 2, "cpus": 2})
    bgray(laptop, f"submit {FILE} {ddp} --set name=unbroken", timeout=400)
    (unbroken,) = runs(str(results / "unbroken"))
    assert unbroken.state == "finished"
    assert unbroken.info["workers"] == 2
    took("an unbroken DDP run")

    # The same again; in the middle of it the machine of one of its two ranks loses its power.
    process = laptop.popen(
        f"cd project && python -m bgray.cluster submit {FILE} {ddp}", stdout=-1, stderr=-2
    )
    until(lambda: steps_of(results / "ddp") >= 120, 240, process)
    (run,) = runs(str(results / "ddp"))
    busy = [w for w in workers if any("RayTrainWorker" in line for _, line in w.processes())]
    assert len(busy) == 2
    lost = next(worker for worker in busy if worker.name != run.info["attempts"][0]["host"])
    lost.kill()
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    (run,) = runs(str(results / "ddp"))
    assert run.state == "finished"
    assert len(run.info["attempts"]) >= 2
    assert run.info["attempts"][-1]["from_step"] > 0
    for name in ("metrics.jsonl", "validation_items.jsonl"):
        assert read_lines(f"{run.url}/{name}") == read_lines(f"{unbroken.url}/{name}")
    took("DDP with one machine lost")

    # A sweep; in the middle of it a trial's process is killed.
    many = write_sweep("many", 800, seeds=2)
    process = laptop.popen(
        f"cd project && python -m bgray.cluster submit {FILE} {many}", stdout=-1, stderr=-2
    )
    until(lambda: steps_of(results / "many") >= 200, 240, process)
    trial = next(r for r in runs(str(results / "many")) if r.state == "running")
    last = trial.info["attempts"][-1]
    next(w for w in workers if w.name == last["host"]).run(f"kill -9 {last['pid']}")
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert [r.state for r in runs(str(results / "many"))] == ["finished"] * 2
    again = read_info(trial.url)["attempts"]
    assert len(again) == 2
    assert again[1]["from_step"] > 0
    steps = [line["step"] for line in read_lines(f"{trial.url}/metrics.jsonl") if "val" not in line]
    assert steps == list(range(10, 801, 10))
    took("a sweep with one trial killed")

    # Stopped on purpose, it has checkpoints and says so.
    long = write_sweep("long", 200_000, runtime={"checkpoint_every": 100_000})
    bgray(laptop, f"submit {FILE} {long} --detach", timeout=120)
    until(lambda: [r for r in runs(str(results / "long")) if r.state == "running"], 120)
    time.sleep(3)
    bgray(laptop, f"stop {FILE} {long}", timeout=200)
    (stopped,) = runs(str(results / "long"))
    assert (stopped.state, stopped.info["reason"]) == ("interrupted", "Ctrl-C")
    assert 0 < steps_of(results / "long") < 100_000
    took("stop")

    # Of the machine without power it cannot say that nothing is left, and says so.
    done = bgray(laptop, f"down {FILE} -y", timeout=240, check=False)
    assert done.returncode == 1
    assert f"{lost.ip}:" in done.stdout + done.stderr
    assert "1 left" in done.stdout + done.stderr
    took("down")
    lost = lab.host(lost.name, lost.ip)
    bgray(laptop, f"down {FILE} -y", timeout=240)
    workers = [lost, *(worker for worker in workers if worker.name != lost.name)]
    took("down again, with that machine back")
    for host in (head, *workers):
        assert processes_of_ray(host) == []


def test_a_cluster_is_not_started_and_not_talked_to_without_its_token(machines, write_sweep):
    laptop, head, _ = machines
    token = laptop.root / ".ray" / "auth_token"
    kept = token.read_text()
    token.unlink()
    refused = bgray(laptop, f"check {FILE}", check=False)
    assert refused.returncode == 2
    assert "auth_token" in refused.stdout + refused.stderr
    up = laptop.run(f"cd project && ray up -y {FILE}", timeout=240, check=False)
    assert up.returncode != 0
    assert not [line for _, line in head.processes() if "gcs_server" in line]

    token.write_text(kept)
    token.chmod(0o600)
    laptop.run(f"cd project && ray up -y {FILE}", timeout=240)
    sweep = write_sweep("tiny", 24)
    token.unlink()
    refused = bgray(laptop, f"submit {FILE} {sweep}", check=False, timeout=120)
    assert refused.returncode == 2
    assert "get-auth-token --generate" in refused.stdout + refused.stderr
    token.write_text("0" * 64)
    token.chmod(0o600)
    refused = bgray(laptop, f"submit {FILE} {sweep}", check=False, timeout=120)
    assert refused.returncode == 2
    assert "another one" in refused.stdout + refused.stderr
    token.write_text(kept)
    bgray(laptop, f"down {FILE} -y", timeout=240)
    assert processes_of_ray(head) == []
