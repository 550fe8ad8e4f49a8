"""A cluster file's lint: each mistake is refused on its line, the shipped files are not."""

import os
import re
import secrets
from pathlib import Path

import pytest

from bgray.cluster_check import check, ray_version, report
from bgray.cluster_yaml import Sheet, refuse_secrets
from bgray.problems import ConfigError

ROOT = Path(__file__).parent.parent
GPU, LOCAL = (ROOT / "cluster" / name for name in ("gpu.yaml", "local.yaml"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home with a token and a key in it, and the project's folder as the current one."""
    folder = tmp_path / "home"
    for name in (".ray", ".ssh"):
        (folder / name).mkdir(parents=True)
    write_token(folder, secrets.token_hex(32))
    (folder / ".ssh" / "id_ed25519").write_text("")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(ROOT)
    return folder


def write_token(home, text, mode=0o600):
    path = home / ".ray" / "auth_token"
    path.write_text(text)
    os.chmod(path, mode)


def changed(tmp_path, source, *edits):
    """A copy of `source` with each (old, new) applied to the first place it is found."""
    text = source.read_text()
    for old, new in edits:
        assert old in text, f"{source.name} no longer has {old!r}"
        text = text.replace(old, new, 1)
    path = tmp_path / source.name
    path.write_text(text)
    return path


def errors(path):
    return [p for p in check(str(path)) if p.error]


PLACEHOLDER = "ami-0123456789abcdef0"
IMAGE = (PLACEHOLDER, "ami-0fedcba9876543210")  # what a person writes first


def line_of(path, text):
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


# --- the shipped files


def test_the_shipped_gpu_file_lacks_only_an_image(tmp_path):
    [problem] = check(str(GPU))
    assert (problem.error, problem.line) == (True, line_of(GPU, "&image"))
    assert f"{PLACEHOLDER} is a placeholder" in problem.text
    assert check(str(changed(tmp_path, GPU, IMAGE))) == []


def test_the_shipped_local_file_lacks_only_the_addresses(tmp_path):
    assert {p.text.split(":")[0] for p in errors(LOCAL)} == {
        f"192.0.2.{n} is a placeholder" for n in (10, 11, 12)
    }
    mine = LOCAL.read_text().replace("192.0.2.", "10.20.30.")
    (tmp_path / "mine.yaml").write_text(mine)
    assert check(str(tmp_path / "mine.yaml")) == []


def test_a_report_says_how_much_there_is_to_mend_and_exits_with_2(tmp_path, capsys):
    assert report(str(changed(tmp_path, GPU, IMAGE))) == 0
    assert "nothing to mend" in capsys.readouterr().out
    path = changed(tmp_path, GPU, IMAGE, ("region: us-west-2", "region: us-west-2  # cheap"),
                   ("max_workers: 24", "max_workers: 4"))  # fmt: skip
    assert report(str(path)) == 0
    assert "0 to mend, 2 warnings" in capsys.readouterr().out
    path = changed(tmp_path, GPU, ("type: aws", "type: asw"))
    assert report(str(path)) == 2
    out = capsys.readouterr().out
    assert f"line {line_of(path, 'asw')}: provider.type: got 'asw'" in out
    assert "1 to mend" in out


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*\n.*no such file"):
        check("nowhere.yaml")


# --- one mistake at a time: (what, file, edits, text on the line that is named, what is said)

SETUP = "- bash ~/bgray/cluster/setup.sh aws\n"
GROUP = "    GroupName: bgray\n"
RULES = GROUP + "    IpPermissions:\n      - "
ONDEMAND = "gpu_worker_ondemand: 1}"
MISTAKES = [
    ("tab", GPU, [("  type: aws", "\ttype: aws")], "\ttype: aws", "not valid YAML"),
    ("twice", GPU, [("head_node_type: head", "head_node_type: head\nmax_workers: 3")],
     "max_workers: 3", "written twice"),
    ("top key", GPU, [("upscaling_speed:", "upscaling_sped:")], "upscaling_sped",
     "did you mean 'upscaling_speed'"),
    ("type key", GPU, [("    max_workers: 4\n", "    max_worker: 4\n")], "max_worker: 4",
     "did you mean 'max_workers'"),
    ("not a number", GPU, [("max_workers: 4\n", 'max_workers: "4"\n')], 'max_workers: "4"',
     "is not of type 'integer'"),
    ("half a CPU", GPU, [("{CPU: 8, GPU: 1, gpu_worker: 1}", "{CPU: 0.5, GPU: 1, gpu_worker: 1}")],
     "CPU: 0.5", "is not of type 'integer'"),
    ("no cluster name", GPU, [("cluster_name: bgray ", "metadat: bgray ")], "metadat: bgray",
     "unknown key, did you mean 'metadata'"),
    ("head type", GPU, [("head_node_type: head", "head_node_type: haed")], "head_node_type",
     "must be one of"),
    ("provider key", GPU, [("  region:", "  regoin:")], "regoin", "did you mean 'region'"),
    ("EC2 key", GPU, [("InstanceType: m7i.4xlarge", "InstanceTyp: m7i.4xlarge")], "InstanceTyp:",
     "unknown key of RunInstances, did you mean 'InstanceType'"),
    ("EC2 type", GPU, [("InstanceType: m7i.4xlarge", "InstanceType: m7i.4xlrage")], "m7i.4xlrage",
     "did you mean 'm7i.4xlarge'"),
    ("EC2 key below", GPU, [("HttpTokens:", "HttpToken:")], "HttpToken:",
     "did you mean 'HttpTokens'"),
    ("EC2 choice", GPU, [("VolumeType: gp3", "VolumeType: gp33")], "gp33", "did you mean"),
    ("EC2 number", GPU, [("VolumeSize: 200", 'VolumeSize: "200"')], 'VolumeSize: "200"',
     "expected a whole number"),
    ("zone", GPU, [("us-west-2c", "us-east-1c")], "us-east-1c", "is no zone of us-west-2"),
    ("stopped nodes", GPU, [("cache_stopped_nodes: false", "cache_stopped_nodes: true")],
     "provider:", "cache_stopped_nodes: false"),
    ("token not mounted", GPU, [('  "~/.ray/auth_token"', '  "~/.ray/another"')], "file_mounts:",
     "the token is missing"),
    ("token mode", GPU, [("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")],
     " ray start --head", "switches the token off"),
    ("no token mode", GPU, [("export RAY_AUTH_MODE=token;", "")],
     " ray start --head", "export RAY_AUTH_MODE=token"),
    ("dashboard open", GPU, [("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")],
     " ray start --head", "got 0.0.0.0"),
    ("dashboard default", GPU, [("--dashboard-host=127.0.0.1", "")],
     " ray start --head", "it is missing"),
    ("no autoscaler", GPU, [("--autoscaling-config=~/ray_bootstrap_config.yaml", "")],
     " ray start --head", "no worker ever starts"),
    ("no head start", GPU, [("ray start --head", "ray start --haed")], "head_start_ray_commands:",
     "no `ray start --head`"),
    ("Ray not pinned", GPU, [(SETUP, "- pip install 'ray[default]'\n")],
     "pip install 'ray", "pin it to ray=="),
    ("another Ray", GPU, [(SETUP, "- pip install ray==2.9.3\n")],
     "pip install ray", "pin it to ray=="),
    ("image's tag", GPU, [("auth:\n", "docker: {image: 'rayproject/ray:latest'}\nauth:\n")],
     "docker:", "not pinned to Ray"),
    ("image's default", GPU, [("auth:\n", "docker: {image: rayproject/ray-ml}\nauth:\n")],
     "docker:", "not pinned to Ray"),
    ("mount", GPU, [("./requirements.txt", "./requirement.txt")], "./requirement.txt",
     "there is no ./requirement.txt"),
    ("no AMI", GPU, [("    ImageId: *image\n", "")], "    node_config:",
     "ImageId is missing"),
    ("AMI", GPU, [("ami-0123456789abcdef0", "latest_dlami")], "latest_dlami", "no image's id"),
    ("spot head", GPU, [("      <<: *on_demand  #", "      <<: *spot  #")],
     "    InstanceMarketOptions:", "the head must not be spot"),
    ("working head", GPU, [("{CPU: 0, GPU: 0}", "{CPU: 4, GPU: 0}")], "CPU: 4",
     "trials run on the head"),
    ("open door", GPU, [(GROUP, RULES + "{FromPort: 8265, ToPort: 8265,"
      " IpProtocol: tcp, IpRanges: [{CidrIp: 0.0.0.0/0}]}\n")],
     "FromPort: 8265", "the whole Internet"),
    ("open door, 6", GPU, [(GROUP, RULES + "{FromPort: 22, ToPort: 22,"
      " IpProtocol: tcp, Ipv6Ranges: [{CidrIpv6: '::/0'}]}\n")],
     "::/0", "say why"),
    ("access key", GPU, [("auth:\n", "auth:\n  # AKIA" + "ABCDEFGHIJKLMNOP\n")], "# AKIA",
     "an AWS access key"),
    ("credentials", GPU, [("auth:\n", "  aws_credentials: {aws_access_key_id: x}\nauth:\n")],
     "aws_credentials", "no keys in a file"),
    ("no fallback", GPU, [("  gpu_worker_ondemand:\n", "  gpu_other:\n"),
                              (ONDEMAND, "gpu_other: 1}")],
     "  gpu_worker:", "add gpu_worker_ondemand"),
    ("smaller fallback", GPU, [("GPU: 1, " + ONDEMAND, "GPU: 2, " + ONDEMAND)], ONDEMAND,
     "GPU: 2, but gpu_worker has 1"),
    ("spot fallback", GPU, [("<<: *on_demand, InstanceType: m7", "<<: *spot, InstanceType: m7")],
     "    InstanceMarketOptions:", "and is spot itself"),
    ("equal priority", GPU, [("    priority: 1\n", "    priority: 10  # wrong\n")],
     "priority: 10  # wrong", "must be below that of cpu_worker"),
    ("no marker", GPU, [("{CPU: 16, cpu_worker: 1}", "{CPU: 16}")], "{CPU: 16}",
     "write cpu_worker: 1 (got None); by it"),
    ("no spot marker", GPU, [("cpu_worker: 1, cpu_worker_ondemand", "cpu_worker_ondemand")],
     "cpu_worker_ondemand: 1}", "write cpu_worker: 1 (got None) too"),
    ("spot marker", GPU, [("GPU: 1, " + ONDEMAND, "GPU: 1, gpu_worker: 1, " + ONDEMAND)], ONDEMAND,
     "what asks for gpu_worker would land here"),
    ("two markers", GPU, [("1, gpu_worker: 1}", "1, gpu_worker: 1, cpu_worker: 1}")],
     "gpu_worker: 1, cpu_worker: 1}", "what asks for cpu_worker would land here"),
    ("disk in clear", GPU, [("Encrypted: true", "Encrypted: false")], "Ebs: {", "Encrypted: true"),
    ("disk stays", GPU, [(", DeleteOnTermination: true", "")], "Ebs: {", "DeleteOnTermination"),
    ("IMDSv1", GPU, [("HttpTokens: required", "HttpTokens: optional")], "MetadataOptions:",
     "HttpTokens: required"),
    ("no profile", GPU, [("    IamInstanceProfile: {Name: bgray-worker}\n", "")],
     "    node_config: {<<: *spot, InstanceType: m7i", "could not read or write S3"),
    ("min over max", GPU, [("min_workers: 0\n", "min_workers: 9\n")],
     "    max_workers: 8", "less than min_workers"),
    ("v2 at home", LOCAL, [(" RAY_enable_autoscaler_v2=0", "")],
     " ray start --head", "RAY_enable_autoscaler_v2=0"),
    ("twice at home", LOCAL, [("[192.0.2.11, 192.0.2.12]", "[10.0.0.1, 10.0.0.1]")], "worker_ips",
     "a machine is one node"),
    ("no workers", LOCAL, [("  worker_ips: [192.0.2.11, 192.0.2.12]\n", "")], "# Your own",
     "Please supply"),
    ("key elsewhere", LOCAL, [("~/.ssh/id_ed25519", "~/.ssh/nothing")], "~/.ssh/nothing",
     "there is no ~/.ssh/nothing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "edits", "marked", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_each_mistake_is_refused_on_its_line(tmp_path, source, edits, marked, said):
    path = changed(tmp_path, source, *edits)
    line = line_of(path, marked)
    if " ray start" in marked:  # a command over several lines begins where its dash is
        lines = path.read_text().splitlines()
        line = max(i for i in range(1, line + 1) if lines[i - 1].startswith("  - "))
    found = errors(path)
    assert [p for p in found if said in p.text and p.line == line], "\n".join(map(str, found))


def test_all_mistakes_of_a_file_are_told_at_once_in_the_order_of_its_lines(tmp_path):
    edits = [m[2][0] for m in MISTAKES if m[0] in ("zone", "EC2 key", "mount", "AMI")]
    found = errors(changed(tmp_path, GPU, *edits))
    lines = [p.line for p in found]
    assert lines == sorted(lines)
    for said in ("is no zone", "InstanceTyp", "requirement.txt", "no image's id"):
        assert any(said in str(p) for p in found), said


# --- the token on this machine


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (None, 0, "there is no token in .*ray get-auth-token --generate && chmod 600"),
        ("", 0o600, "is empty"),
        ("my-token", 0o600, "64 hexadecimal digits"),
        ("ab" * 32, 0o644, r"read by others \(mode bits 044\); run `chmod 600"),
    ],
)
def test_a_token_that_is_none_is_refused_with_the_way_out(tmp_path, home, text, mode, said):
    if text is None:
        (home / ".ray" / "auth_token").unlink()
    else:
        write_token(home, text, mode)
    [problem] = errors(changed(tmp_path, GPU, IMAGE))
    assert re.search(said, problem.text)
    assert problem.line == line_of(GPU, '"~/.ray/auth_token"')


def test_port_22_may_be_open_to_all_when_the_line_says_why(tmp_path):
    rule = "{FromPort: 22, ToPort: 22, IpProtocol: tcp, IpRanges: [{CidrIp: 0.0.0.0/0}]}"
    said = (GROUP, f"{RULES}{rule}  # people travel\n")
    assert errors(changed(tmp_path, GPU, IMAGE, said)) == []
    assert errors(changed(tmp_path, GPU, IMAGE, (GROUP, f"{RULES}{rule}\n")))


def test_requirements_with_another_ray_are_refused(tmp_path):
    other = tmp_path / "requirements.txt"
    other.write_text("numpy==2.0\nray[default]==2.1.0 ; python_version > '3'\n")
    path = changed(tmp_path, GPU, IMAGE, ("./requirements.txt", str(other)))
    [problem] = errors(path)
    assert f"ray==2.1.0, this machine {ray_version()}" in problem.text


def test_what_only_costs_more_is_a_warning(tmp_path):
    path = changed(
        tmp_path, GPU, IMAGE, ("min_workers: 0", "min_workers: 2"), ("python -m bgray.spot", ":"),
        ("  cpu_worker_ondemand:\n", "  cpu_more:\n"),
        ("cpu_worker: 1, cpu_worker_ondemand: 1", "cpu_more: 1"),
    )  # fmt: skip
    found = check(str(path))
    assert not [p for p in found if p.error]
    for said in ("busy or not", "bgray.spot", "with cpu_worker_ondemand: 1, cpu_worker: 1"):
        assert any(said in p.text for p in found), said


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("rayproject/ray:2.60.0-py312-gpu", None),
        (f"rayproject/ray@sha256:{'0a' * 32}", None),
        ("registry.example:5000/me/bgray:7-ray-2.60.0", None),
        (f"registry.example:5000/me/bgray:7@sha256:{'0a' * 32}", None),
        ("registry.example:5000/me/bgray:7", "does not say that it has Ray 2.60.0"),
        ("registry.example:5000/me/bgray", "does not say that it has Ray 2.60.0"),
    ],
)
def test_an_image_of_ones_own_need_not_name_ray_and_a_digest_is_exact(tmp_path, image, said):
    docker = f"docker: {{image: '{image}', container_name: x}}\nauth:\n"
    found = check(str(changed(tmp_path, GPU, IMAGE, ("auth:\n", docker))))
    assert not [p for p in found if p.error]
    assert [said in p.text for p in found] == ([True] if said else [])


# --- lines and secrets


def test_a_merged_key_is_found_where_it_is_written(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b\n  x: 1\n  y: {z: 1}\nuse:\n  <<: *b\n  x: 2\n")
    sheet = Sheet(str(path))
    assert sheet.line(("use", "x")) == 6  # its own wins
    assert sheet.line(("use", "y", "z")) == 3
    assert sheet.line(("use", "w")) == 4  # missing: the nearest above


def test_an_anchor_that_holds_itself_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("provider: &p\n  type: aws\n  more: *p\n")
    [problem] = errors(path)
    assert "refers to itself" in problem.text


@pytest.mark.parametrize(
    "line",
    [
        "a: ASIA" + "QWERTYUIOPASDFGH",
        "# -----BEGIN " + "OPENSSH PRIVATE KEY-----",
        "password: hunter2hunter2",
        "- export RAY_AUTH_TOKEN=" + "ab" * 32,
        "- export WANDB_API_KEY=0123456789",
        "AWS_SECRET_ACCESS_KEY: 'abcdefghij'",
        "- git clone https://me:" + "letmein@example.org/x",
        "- token " + "hf_" + "abcdefghijklmnopqrst",
        "value: " + "aB3" * 14,
        "key: " + "0f" * 16,
        "WANDB_KEY: abcdefghij",
        "- export MY_TOKEN=abcdefgh && train",
        "{client-secret: 'abcdefgh', x: 1}",
        "address: https://example.org/x?sig=" + "0f" * 32,
        "env: [{name: WANDB_KEY, value: abcdefghij}]",
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path, line):
    path = tmp_path / "a.yaml"
    path.write_text(f"# first\n{line}\n")
    sheet = Sheet(str(path))
    sheet.problems.clear()
    refuse_secrets(sheet)
    [problem] = sheet.problems
    assert problem.line == 2
    assert re.split(r"[=: ]", line)[-1].rstrip("}]") not in problem.text


@pytest.mark.parametrize(
    "line",
    [
        '"~/.ray/auth_token": ~/.ray/auth_token',
        "secretName: bgray-token",
        '#   --from-literal=auth_token="$(openssl rand -hex 32)"',
        "MetadataOptions: {HttpTokens: required}",
        "export RAY_AUTH_MODE=token",
        "image: ami-0123456789abcdef0",
        "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
        "password: ${PASSWORD_FROM_THE_SHELL}",
        "image: registry.example/me/bgray@sha256:" + "0a" * 32,
        "path: s3://bucket/" + "0a" * 32 + "/" + "aB3" * 20,
        "- cp /mnt/" + "0a" * 20 + "/" + "aB3" * 20 + " ./" + "0a" * 20,
        "WANDB_KEY: $WANDB_KEY",
        "WANDB_KEY: ~/keys/wandb.txt",
        "WANDB_KEY: ''",
        "KeyName: my-key-pair-of-oregon",
        "ssh_private_key: ~/.ssh/id_ed25519",
        "ssh_private_key: id_ed25519.pem",
        "- Tags: [{Key: ray-cluster-name, Value: bgray-of-ann}]",
        "- &tolerate {key: nvidia.com/gpu, operator: Exists}",
        "secretKeyRef: {name: bgray-token, key: auth_token}",
        "topologyKey: kubernetes.io/hostname",
        "automountServiceAccountToken: false",
        "# the token: whoever-has-it runs code here",
        "env: [{name: WANDB_KEY, value: $(WANDB)}, {name: WANDB_KEY_FILE, value: abcdefghij}]",
    ],
)
def test_what_is_no_secret_is_let_through(tmp_path, line):
    path = tmp_path / "a.yaml"
    path.write_text(f"{line}\n")
    sheet = Sheet(str(path))
    sheet.problems.clear()
    refuse_secrets(sheet)
    assert sheet.problems == set()
