"""The lab keeps what it promises: hosts are apart from the machine, and nothing stays behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bgray.session import PATIENT

from .conftest import need_lab
from .fakecloud import FakeCloud
from .lab import REPOSITORY, Lab, _stat
from .moto_aws import Moto

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LOCAL_YAML = """
cluster_name: lab
provider: {type: local, head_ip: 10.77.0.10, worker_ips: [10.77.0.11]}
auth: {ssh_user: ubuntu, ssh_private_key: ~/.ssh/id_ed25519}
min_workers: 1
max_workers: 1
file_mounts: {"~/.ray/auth_token": "~/.ray/auth_token"}
initialization_commands: ["echo export RAY_AUTH_MODE=token >> ~/.bashrc"]
head_start_ray_commands:
  - ray stop
  - >-
    ray start --head --port=6379 --num-cpus=0 --object-store-memory=100000000
    --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml
worker_start_ray_commands:
  - ray stop
  - >-
    ray start --address=$RAY_HEAD_IP:6379 --num-cpus=1 --resources='{"here": 1}'
    --object-store-memory=100000000
"""


def _mounts():
    return Path("/proc/self/mounts").read_text()


def _in_hosts(folder):
    """(pid, start time) of this machine's processes that see a mount of `folder`."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and str(folder) in (path / "mountinfo").read_text():
                found.append((int(path.name), _stat(path.name)[1]))
        except OSError:
            continue
    return found


def _alive(processes):
    """Those of (pid, start time) that are still there."""
    left = []
    for pid, started in processes:
        with contextlib.suppress(OSError):
            left += [pid] if _stat(pid)[1] == started else []
    return left


def _until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _interfaces():
    return sorted(os.listdir("/sys/class/net"))


def test_a_host_reaches_its_neighbours_and_nothing_of_this_machine_or_beyond(lab):
    one, two = lab.host("one", "10.77.0.10"), lab.host("two", "10.77.0.11", ("54.214.1.2",))
    connect = "python3 -c 'import socket,sys; socket.create_connection((sys.argv[1], {}), 2)' {}"
    for ip in ("10.77.0.11", "54.214.1.2"):  # the second: as made up as moto's public addresses
        assert one.run(connect.format(22, ip)).returncode == 0
    with socket.create_server(("0.0.0.0", 0)) as server:
        addresses = {"127.0.0.1", "10.77.0.1", socket.gethostbyname("localhost")}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("1.1.1.1", 53))  # sends nothing; says which address would be used
                addresses.add(probe.getsockname()[0])
            except OSError:
                pass  # a machine without a network
        for address in addresses:
            command = connect.format(server.getsockname()[1], address)
            assert one.run(command, check=False).returncode == 1, address
    assert one.run(connect.format(443, "1.1.1.1"), check=False).returncode == 1
    lab.partition(two)
    assert one.run(connect.format(22, two.ip), check=False).returncode == 1
    lab.heal(two)
    assert one.run(connect.format(22, two.ip)).returncode == 0


def test_a_host_writes_only_to_its_own_folders(lab, tmp_path):
    one, two = lab.host("one", "10.77.0.10"), lab.host("two", "10.77.0.11")
    places = ["/", "/usr", "/work" if Path("/work").is_dir() else "/opt", REPOSITORY, sys.prefix]
    for place in places:
        written = one.run(f"touch {place}/from-a-host", check=False)
        assert "Read-only" in written.stderr, place
        assert not (Path(place) / "from-a-host").exists()
    one.run(
        "for d in ~ /tmp /etc /run /mnt /var/tmp /dev/shm /mnt/shared; do echo 1 > $d/mark; done"
    )
    seen = two.run("ls ~/mark /tmp/mark /etc/mark /run/mark /mnt/mark /dev/shm/mark", check=False)
    assert seen.stdout == ""
    assert two.run("cat /mnt/shared/mark").stdout == (lab.shared / "mark").read_text() == "1\n"
    assert not Path("/tmp/mark").exists()
    assert not Path("/etc/mark").exists()
    assert two.run("find /dev -type b").stdout == ""  # no disk to format by mistake
    version = two.run("python -c 'import bgray; print(bgray.__file__)'").stdout
    assert version.strip() == str(REPOSITORY / "bgray" / "__init__.py")


def test_processes_of_a_host_are_its_own_and_power_off_ends_them(lab):
    one, two = lab.host("one", "10.77.0.10"), lab.host("two", "10.77.0.11")
    one.run("setsid nohup sleep 4321 > /dev/null 2>&1 &")
    _until(lambda: [line for _, line in one.processes()] == ["sleep 4321"])
    assert "4321" not in two.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    job = two.popen("sleep 1234")
    assert "4321" not in str(two.processes())
    one.kill()
    assert one.processes() == []
    assert job.poll() is None
    two.signal(job, signal.SIGTERM)
    assert job.wait(timeout=5) != 0
    with pytest.raises(AssertionError, match="longer than 0.5 s"):
        two.run("sleep 77", timeout=0.5)
    _until(lambda: two.processes() == [])


def test_setup_sh_makes_an_environment_of_a_bare_host_and_installs_nothing(lab):
    laptop, node = lab.laptop(), lab.host("node", "10.77.0.10", environment=False)
    assert node.run("command -v ray", check=False).returncode == 1
    to = "-e 'ssh -o StrictHostKeyChecking=no' ubuntu@10.77.0.10:bgray/"
    what = "bgray cluster pyproject.toml README.md LICENSE requirements.txt"
    laptop.run(f"cd project && rsync -a {what} {to}")
    node.run("bash ~/bgray/cluster/setup.sh")
    assert node.run("command -v python").stdout.strip() == "/root/bgray-env/bin/python"
    assert node.run("python -c 'import bgray, ray; print(ray.__version__)'").stdout == "2.60.0\n"
    calls = (node.root / "uv.log").read_text()
    assert "requirements.txt" in calls
    node.run("bash ~/bgray/cluster/setup.sh")
    assert (node.root / "uv.log").read_text() == calls


def test_nothing_remains_when_a_lab_closes_while_its_hosts_work(tmp_path):
    need_lab()
    before = _mounts(), _interfaces()
    with Lab(tmp_path / "a") as lab, Lab(tmp_path / "b") as other:
        other.host("one", "10.77.0.10")  # the same name and address, at the same time
        host = lab.host("one", "10.77.0.10")
        host.run("setsid nohup sleep 4321 > /dev/null 2>&1 &")
        job = host.popen("sleep 1234")
        keepers = [(pid, _stat(pid)[1]) for pid in (lab.pid, other.pid)]
        processes = _in_hosts(tmp_path)
        assert len(processes) >= 6  # per host: its first process, sshd; our two commands
    assert _alive(processes + keepers) == []
    assert job.wait(timeout=5) != 0
    assert list(tmp_path.iterdir()) == []
    assert (_mounts(), _interfaces()) == before


def test_nothing_remains_of_a_lab_whose_process_was_killed(tmp_path):
    need_lab()
    before = _mounts(), _interfaces()
    code = f"""
        import sys, time
        sys.path.insert(0, {str(REPOSITORY / "tests")!r})
        from cluster.lab import Lab
        with Lab({str(tmp_path / "lab")!r}) as lab:
            lab.host("one", "10.77.0.10").run("setsid nohup sleep 4321 > /dev/null 2>&1 &")
            print(lab.pid, flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        keeper = int(process.stdout.readline())
        processes = [*_in_hosts(tmp_path), (keeper, _stat(keeper)[1])]
        assert len(processes) >= 4
        process.kill()
    _until(lambda: not _alive(processes))  # nobody is left to wait for them
    assert (_mounts(), _interfaces()) == before
    with Lab(tmp_path / "next"):
        assert not (tmp_path / "lab").exists()  # a new lab sweeps up


def test_instances_are_hosts_with_a_role_and_hear_of_their_end(lab):
    moto, laptop = Moto(lab), lab.laptop()
    launch = {
        "ImageId": "ami-0123456789abcdef0",
        "MinCount": 1,
        "MaxCount": 1,
        "IamInstanceProfile": {"Name": "bgray-worker"},
        "InstanceMarketOptions": {"MarketType": "spot"},
    }
    ec2, s3 = moto.client("ec2"), moto.client("s3")
    with FakeCloud(lab, moto, laptop) as cloud:
        moto.faults(no_spot=["g5.2xlarge"])
        with lab.network():
            with pytest.raises(ec2.exceptions.ClientError, match="InsufficientInstanceCapacity"):
                ec2.run_instances(InstanceType="g5.2xlarge", **launch)
            profile = launch.pop("IamInstanceProfile")
            ec2.run_instances(InstanceType="m5.large", **launch)
        _until(lambda: cloud.hosts)
        [(instance_id, host)] = cloud.hosts.items()
        with lab.network():  # as it may happen to anybody who looks while moto starts one
            ec2.associate_iam_instance_profile(IamInstanceProfile=profile, InstanceId=instance_id)
        url = "http://169.254.169.254/latest"
        ask = f"{sys.executable} -c 'import urllib.request as u, sys\n"
        ask += f'r = u.Request("{url}/api/token", method="PUT")\n'
        ask += 'r.add_header("X-aws-ec2-metadata-token-ttl-seconds", "60")\n'
        ask += "t = u.urlopen(r).read().decode()\n"
        ask += f'r = u.Request("{url}/meta-data/" + sys.argv[1])\n'
        ask += 'r.add_header("X-aws-ec2-metadata-token", t)\n'
        ask += "print(u.urlopen(r).read().decode())' "
        assert host.run(ask + "instance-id").stdout.strip() == instance_id
        role = ask + "iam/security-credentials/"
        _until(lambda: host.run(role, check=False).stdout == f"{profile['Name']}\n")
        assert "404" in host.run(ask + "spot/instance-action", check=False).stderr
        bare = f"{sys.executable} -c 'import urllib.request as u; u.urlopen(\"{url}/\")'"
        assert "401" in host.run(bare, check=False).stderr
        # The keys come from the metadata service: there are none in the host's environment.
        code = 'import boto3; print(boto3.client("s3").list_buckets()["Buckets"])'
        patient = " ".join(f"{key}={value}" for key, value in PATIENT.items())
        assert host.run(f"{patient} {sys.executable} -c '{code}'").stdout == "[]\n"
        cloud.spot_notice(instance_id, seconds=15)
        told = json.loads(host.run(ask + "spot/instance-action").stdout)
        assert told["action"] == "terminate"
        _until(lambda: not host.alive)
        assert cloud.instances() == []
        assert cloud.errors == []

        where = {"LocationConstraint": "us-west-2"}
        with lab.network():
            s3.create_bucket(Bucket="bgray", CreateBucketConfiguration=where)
            s3.put_object(Bucket="bgray", Key="key", Body=b"x" * 1000)
            moto.faults(s3="short")
            with pytest.raises(Exception, match="Expected checksum"):
                s3.get_object(Bucket="bgray", Key="key")["Body"].read()
            moto.faults(s3="cut")
            with pytest.raises(Exception, match="IncompleteRead|Connection broken"):
                s3.get_object(Bucket="bgray", Key="key")["Body"].read()
            moto.faults(s3="503", s3_seconds=1.5)
            with pytest.raises(s3.exceptions.ClientError, match="SlowDown"):
                s3.get_object(Bucket="bgray", Key="key")
            time.sleep(1.5)
            assert len(s3.get_object(Bucket="bgray", Key="key")["Body"].read()) == 1000
    assert {"InsufficientInstanceCapacity", "short", "cut", "503"} <= {
        call["fault"] for call in moto.calls()
    }
    assert [call["status"][:3] for call in moto.calls("RunInstances")][-1] == "200"


def test_ray_up_with_a_token_brings_a_worker_and_ray_down_stops_the_head(lab):
    laptop, head = lab.laptop(), lab.host("head", "10.77.0.10")
    worker = lab.host("worker", "10.77.0.11")
    (laptop.root / "local.yaml").write_text(LOCAL_YAML)
    env = "export RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=0; "
    laptop.run(env + "ray up -y local.yaml", timeout=120)
    code = """
        import ray, time
        ray.init(address="auto", log_to_driver=False)
        while "here" not in ray.cluster_resources():
            time.sleep(0.5)
        print(ray.get(ray.remote(resources={"here": 1})(lambda: open("/etc/hostname").read and
                      __import__("socket").gethostname()).remote()))
    """
    (head.root / "ask.py").write_text(textwrap.dedent(code))
    assert head.run("python ask.py", timeout=120).stdout.split()[-1] == "worker"
    refused = head.run("RAY_AUTH_MODE=disabled ray status", check=False, timeout=60)
    assert refused.returncode != 0
    laptop.run(env + "ray down -y local.yaml", timeout=120)
    assert not [line for _, line in head.processes() if "ray" in line]
    assert worker.alive
