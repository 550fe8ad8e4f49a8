"""cluster/setup.sh with a `uv` that only writes down what it was asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

UV = """#!/bin/bash
echo "$*" >> "$HOME/uv.log"
[ ! -f "$HOME/uv-fails" ] || { echo "no such version"; echo; exit 7; }
if [ "$1" = venv ]; then
  mkdir -p "${@: -1}/bin"
  printf '#!/bin/sh\\nexit 0\\n' > "${@: -1}/bin/python"
  chmod +x "${@: -1}/bin/python"
fi
"""


@pytest.fixture
def home(tmp_path):
    """A home as file_mounts leave it: the project's files in ~/bgray, little of the package."""
    home = tmp_path / "home"
    (home / "bgray" / "bgray").mkdir(parents=True)
    (home / "bgray" / "cluster").mkdir()
    (home / "bgray" / "bgray" / "__init__.py").write_text('"""a package"""\n')
    for name in ("requirements.txt", "pyproject.toml", "README.md", "LICENSE", "cluster/setup.sh"):
        shutil.copy(ROOT / name, home / "bgray" / name)
    (tmp_path / "bin").mkdir()
    # No disks: a test must never find one of this machine's worth formatting.
    for name, script in (("uv", UV), ("lsblk", "#!/bin/sh\n"), ("sudo", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (home / ".bashrc").write_text("# as it was\n")
    return home


def setup(home, *roles, code=0, path=os.environ["PATH"]):
    """(the calls of uv that this run added, what it wrote to stderr)"""
    log = home / "uv.log"
    before = log.read_text().splitlines() if log.exists() else []
    path = f"{home.parent / 'bin'}:{path}"
    done = subprocess.run(
        ["bash", str(home / "bgray" / "cluster" / "setup.sh"), *roles],
        env={"HOME": str(home), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    after = log.read_text().splitlines() if log.exists() else []
    return after[len(before) :], done.stderr


def shell(home, command):
    """What a login shell of that home answers."""
    line = ["bash", "-c", f"source ~/.bashrc; {command}"]
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_the_first_run_makes_everything_and_the_second_nothing(home):
    calls, said = setup(home)
    assert [c.split(" --")[0] for c in calls] == ["venv", "pip sync", "pip install"]
    assert "--managed-python --python 3.12.16 " in calls[0]  # uv's own has headers
    assert calls[1].endswith("bgray/requirements.txt")
    assert "--no-deps --reinstall-package bgray" in calls[2]
    assert said == ""
    bashrc = (home / ".bashrc").read_text()
    assert setup(home) == ([], "")
    assert (home / ".bashrc").read_text() == bashrc


def test_only_what_changed_is_made_again(home):
    setup(home)
    (home / "bgray" / "bgray" / "__init__.py").write_text('"""another"""\n')
    (home / "bgray" / "bgray" / "__init__.pyc").write_text("not source")
    assert [c.split(" --")[0] for c in setup(home)[0]] == ["pip install"]
    with (home / "bgray" / "requirements.txt").open("a") as file:
        file.write("leftpad==1.0\n")
    calls, _ = setup(home)  # the environment is synced, which takes the package out
    assert [c.split(" --")[0] for c in calls] == ["pip sync", "pip install"]


def test_an_environment_that_was_deleted_is_made_again(home):
    setup(home)
    shutil.rmtree(home / "bgray-env")
    assert len(setup(home)[0]) == 3


def test_the_head_on_aws_gets_the_boto3_of_the_pinned_botocore_once(home):
    setup(home)
    [call] = setup(home, "head", "aws")[0]
    pins = (ROOT / "requirements.txt").read_text().split()
    pin = next(p for p in pins if p.startswith("botocore=="))
    assert call.endswith(" " + pin.replace("botocore", "boto3"))
    assert setup(home, "head", "aws")[0] == []


def test_a_shell_finds_ray_and_asks_for_the_token_and_only_the_heads_waits_for_jobs(home):
    setup(home)
    assert shell(home, "echo $RAY_AUTH_MODE") == "token"
    assert shell(home, "echo ${PATH%%:*}") == str(home / "bgray-env" / "bin")
    assert shell(home, '[ -w "$BGRAY_SPILL" ] && echo yes') == "yes"
    assert shell(home, "echo $RAY_JOB_STOP_WAIT_TIME_S") == ""
    setup(home, "head")
    setup(home)  # as `ray up` runs it on the head: first as any node
    assert shell(home, "echo $RAY_JOB_STOP_WAIT_TIME_S") == "120"
    assert shell(home, "grep -c bgray ~/.bashrc") == "1"


def test_a_machine_on_aws_waits_for_its_credentials_and_another_one_does_not(home):
    """boto gives the metadata service one try of a second, and a busy machine misses that."""
    asked = "echo $AWS_METADATA_SERVICE_TIMEOUT $AWS_METADATA_SERVICE_NUM_ATTEMPTS"
    setup(home)
    assert shell(home, asked) == ""
    assert len(setup(home, "aws")[0]) == 0  # only a head starts others, with boto3
    assert shell(home, asked) == "10 5"


def test_a_shell_that_is_not_interactive_has_it_too(home):
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n")
    setup(home)
    assert shell(home, "echo $RAY_AUTH_MODE") == "token"


def test_a_step_that_fails_is_said_in_one_line_and_tried_again(home):
    (home / "uv-fails").touch()
    _, said = setup(home, code=1)
    assert len(said.splitlines()) == 1
    assert "making" in said
    assert "failed (exit 7): no such version" in said
    (home / "uv-fails").unlink()
    assert len(setup(home)[0]) == 3


SYSTEM = "/usr/bin:/bin"  # where no uv is
PYTHON3 = """#!/bin/bash
case "$1 $2 $(cat ~/has)" in
  "-m venv "*venv*)
    mkdir -p "${@: -1}/bin"
    printf '#!/bin/sh\\ncp ~/uv %s/bin/uv\\n' "${@: -1}" > "${@: -1}/bin/pip"
    chmod +x "${@: -1}/bin/pip" ;;
  "-m pip "*pip*) mkdir -p ~/.local/bin; cp ~/uv ~/.local/bin/uv ;;
  *) echo "No module named $2"; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("has", "sudo", "place"),
    [
        ("venv", "exit 1", ".bgray/uv/bin/uv"),
        ("pip", "exit 1", ".local/bin/uv"),
        ("", '[ "$2" != apt-get ] || echo "$*" >> ~/asked; case "$*" in *python3-venv) '
         "echo venv > ~/has;; esac", ".bgray/uv/bin/uv"),
    ],
)  # fmt: skip
def test_a_machine_without_uv_gets_it_by_whatever_it_has(home, tmp_path, has, sudo, place):
    no_uv(home, tmp_path, has, sudo)
    assert len(setup(home, path=SYSTEM)[0]) == 3
    assert (home / place).exists()
    assert (home / "asked").exists() == (not has)


def test_a_machine_without_any_way_to_uv_says_which_there_are(home, tmp_path):
    no_uv(home, tmp_path, "", "exit 1")
    _, said = setup(home, code=1, path=SYSTEM)
    assert len(said.splitlines()) == 1
    assert "none of python3 -m venv, pip and sudo apt-get install python3-venv works" in said


def no_uv(home, tmp_path, has, sudo):
    """A machine with python3 and these modules of it, and with that sudo."""
    (tmp_path / "bin" / "uv").rename(home / "uv")
    (home / "has").write_text(has)
    for name, script in (("python3", PYTHON3), ("sudo", f"#!/bin/sh\n{sudo}\n")):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)


def test_files_that_were_not_mounted_are_named(home):
    (home / "bgray" / "requirements.txt").unlink()
    _, said = setup(home, code=1)
    assert "requirements.txt is not there: file_mounts" in said


def test_objects_spill_to_the_images_nvme_disk(home, tmp_path):
    (tmp_path / "bin" / "mountpoint").write_text('#!/bin/sh\n[ "$2" = /opt/dlami/nvme ]\n')
    # That folder is not made on the machine that tests, only asked for.
    (tmp_path / "bin" / "mkdir").write_text(
        '#!/bin/sh\ncase "$*" in *dlami*) echo "$*" >> ~/asked;; *) exec /bin/mkdir "$@";; esac\n'
    )
    for name in ("mountpoint", "mkdir"):
        (tmp_path / "bin" / name).chmod(0o755)
    setup(home)
    assert (home / "asked").read_text() == "-p /opt/dlami/nvme/bgray_spill\n"
    assert shell(home, "echo $BGRAY_SPILL") == "/opt/dlami/nvme/bgray_spill"


def test_without_an_nvme_disk_objects_spill_to_the_root_volume(home):
    setup(home)
    assert shell(home, "echo $BGRAY_SPILL") == "/var/tmp/bgray_spill"


@pytest.mark.parametrize("formatted", [True, False])
def test_only_an_instance_disk_without_anything_on_it_is_formatted(home, tmp_path, formatted):
    said = "/dev/nvme0n1 Amazon Elastic Block Store\n/dev/nvme1n1 Amazon EC2 NVMe Instance Storage"
    tools = {
        "lsblk": f'case "$1" in -dnpo) echo "{said}";; *) echo nvme1n1;; esac',
        "sudo": 'if [ "$2" = blkid ]; then exit $(cat ~/blkid); fi; [ "$2" = true ] ||'
        ' echo "$2 $(eval echo \\$$#)" >> ~/asked',
        "mkdir": 'case "$*" in *nvme*) ;; *) exec /bin/mkdir "$@";; esac',
    }
    for name, script in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (home / "blkid").write_text("0" if formatted else "2")
    setup(home)
    asked = (home / "asked").read_text().splitlines()
    assert ("mkfs.ext4 /dev/nvme1n1" in asked) == (not formatted)
    assert "mount /mnt/nvme" in asked
    assert not [line for line in asked if "nvme0n1" in line]
    assert shell(home, "echo $BGRAY_SPILL") == "/mnt/nvme/bgray_spill"
