"""Hosts on one machine, made of namespaces, on which `ray up` runs for real.

How it holds together: one keeper process (pid 1 of a PID namespace, in a network namespace with a
bridge and no way out) is the ancestor of every host. It dies with the process that made the `Lab`,
and everything dies with it: hosts, their interfaces, their mounts. Only the folder is left then,
and the next lab removes it.

Inside a host the real file system is read-only. Its own are HOME (/root), /tmp, /etc, /run, /mnt,
/dev (without disks), /var/log, /var/tmp; `Lab.shared` is at /mnt/shared, as NFS would be. This
Python, the virtual environment and the repository are at their real paths. `uv` there is a script
that only writes ~/uv.log, so `cluster/setup.sh` runs for real and installs nothing: ~/bgray-env is
a folder of links to this virtual environment. `sudo` does nothing but run its command.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = "/mnt/shared"  # where every host sees Lab.shared
GATEWAY = "10.77.0.1"  # the bridge; what runs beside the hosts (moto) listens there
REGISTRY = Path(tempfile.gettempdir()) / "bgray-labs"  # one file per living lab
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "sshd", "rsync")
WHERE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_count = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)

# Pid 1 of the lab. bash reaps what is orphaned in the namespace only while it waits.
KEEPER = "mount -t proc proc /proc; echo ready; read -r _; while :; do sleep 3600 & wait; done"

# Pid 1 of a host: HOST (its folder), SHARED_FOLDER, PINS (paths to keep, one per line), NAME.
INIT = r"""
set -eu
read -r _  # until eth0 is there
exec < /dev/null
hostname "$NAME"
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
lab=/media
mount -t tmpfs tmpfs $lab
mkdir $lab/host $lab/shared
mount --bind "$HOST" $lab/host
mount --bind "$SHARED_FOLDER" $lab/shared
# Binds made from here on copy "read-only" from where they come from.
# `bind` matters: it makes this namespace's mount read-only, not the file system of the machine.
awk '$5 !~ "^/(proc|dev|media)(/|$)" {print $5}' /proc/self/mountinfo | while read -r path; do
  mount -o remount,bind,ro "$path" 2> /dev/null || true
done
pins=0
while read -r path; do
  mkdir $lab/pin$pins
  mount --bind "$path" $lab/pin$pins
  pins=$((pins + 1))
done <<< "$PINS"
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /var/tmp
# A /dev without disks: nothing in a host can format one, whatever a set-up script believes to see.
mkdir $lab/dev
mount -t tmpfs -o mode=755 tmpfs $lab/dev
mkdir $lab/dev/pts $lab/dev/shm
for node in null zero full random urandom tty; do cp -a /dev/$node $lab/dev/$node; done
mount -t tmpfs -o mode=1777,size=90% tmpfs $lab/dev/shm
mount -t devpts -o newinstance,mode=600,ptmxmode=0666 devpts $lab/dev/pts
ln -s pts/ptmx $lab/dev/ptmx
ln -s /proc/self/fd $lab/dev/fd
for i in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${i%:*} $lab/dev/${i#*:}; done
mount --rbind $lab/dev /dev
touch /var/log/lastlog /var/log/wtmp /run/utmp  # sshd complains at each log-out otherwise
mkdir -p /run/sshd /mnt/shared
mount --bind $lab/shared /mnt/shared
mount --bind $lab/host/etc /etc
mount --bind $lab/host/root /root
mount --bind $lab/host/tmp /tmp
pins=0
while read -r path; do
  case "$path" in /tmp/* | /root/* | /mnt/* | /run/* | /var/* | /etc/*)
    mkdir -p "$path"
    mount --bind $lab/pin$pins "$path" ;;
  esac
  pins=$((pins + 1))
done <<< "$PINS"
cd /
/usr/sbin/sshd -D -e -f /etc/lab/sshd_config &
while :; do sleep 3600 & wait -n; done
"""

# Any `uv` is only noted down; `uv venv FOLDER` makes links to the environment that is there.
FAKE_UV = """#!/bin/bash
printf '%s\\n' "$*" >> ~/uv.log
case "${1:-}" in
  --version | -V | version) echo "uv ${LAB_UV_VERSION:-0.9.0}" ;;
  venv)
    shift
    while [ $# -gt 0 ]; do
      case "$1" in
        --python | -p | --seed-from | --prompt | --index-strategy) shift ;;
        -*) ;;
        *) folder=$1 ;;
      esac
      shift
    done
    folder=${folder:-.venv}
    mkdir -p "$folder"
    for part in bin lib pyvenv.cfg; do ln -sfn "ENVIRONMENT/$part" "$folder/$part"; done ;;
esac
"""


def missing() -> list[str]:
    """What this machine lacks for a `Lab`, in words; empty when it has all."""
    lacks = [] if os.geteuid() == 0 else ["root"]
    lacks += [tool for tool in TOOLS if shutil.which(tool, path=WHERE) is None]
    if not lacks:
        made = subprocess.run(
            ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"],
            capture_output=True,
        )
        lacks += [] if made.returncode == 0 else ["the right to make namespaces"]
    return lacks


def _stat(pid):
    """(parent's pid, start time in ticks) of a process; OSError when it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[19])


def _processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _child(pid, process, seconds=60.0):
    """The only child of `pid`, waited for while `process` lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        for other in _processes():
            with contextlib.suppress(OSError, IndexError):
                if _stat(other)[0] == pid:
                    return other
        time.sleep(0.01)
    raise RuntimeError(f"process {pid} made no child; exit status {process.poll()}")


def _kill(pid, sig=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)


def sweep_up() -> None:
    """Removes what a lab left whose process was killed: its folder; its keeper should it live."""
    for entry in REGISTRY.glob("*.json") if REGISTRY.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, KeyError):
            lab = json.loads(entry.read_text())
            with contextlib.suppress(OSError):
                if _stat(lab["owner"][0])[1] == lab["owner"][1]:
                    continue
            with contextlib.suppress(OSError):
                if _stat(lab["keeper"][0])[1] == lab["keeper"][1]:
                    os.kill(lab["keeper"][0], signal.SIGKILL)
            shutil.rmtree(lab["folder"], ignore_errors=True)
            entry.unlink(missing_ok=True)


class Host:
    """One machine of a `Lab`; made by `Lab.host`.

    `root` is its /root and `tmp` its /tmp as this process sees them.
    """

    def __init__(self, lab, name, ip, extra_ips, env, home_files, environment):
        self.lab, self.name, self.ip, self.env = lab, name, ip, dict(env)
        self.folder = lab.folder / "hosts" / name
        self.root, self.tmp, self.etc = (self.folder / part for part in ("root", "tmp", "etc"))
        self.log = self.folder / "console.log"
        self.link = f"v{next(lab.links)}"
        self.alive = False
        self._files(home_files, environment)
        self._boot(extra_ips)

    def _files(self, home_files, environment):
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (self.root / ".ssh", self.tmp, self.etc):
            folder.mkdir(parents=True)
        self.root.chmod(0o700)
        self.tmp.chmod(0o1777)
        subprocess.run(["cp", "-a", "/etc/.", str(self.etc)], check=True)
        tools = self.etc / "lab" / "bin"
        tools.mkdir(parents=True)
        _script(tools / "uv", FAKE_UV.replace("ENVIRONMENT", sys.prefix))
        _script(tools / "sudo", '#!/bin/bash\nwhile [[ $1 = -* ]]; do shift; done\nexec "$@"\n')
        python = f"/root/bgray-env/bin:{sys.prefix}/bin:" if environment else ""
        env = {
            "PATH": f"/etc/lab/bin:{python}{WHERE}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        } | self.env
        exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in env.items())
        (self.etc / "profile.d" / "lab.sh").write_text(exports)
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n{self.ip} {self.name}\n")
        # No name server answers here; asking one would take seconds each time.
        _replace(self.etc / "resolv.conf", "")
        _replace(self.etc / "nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
        # The user a cloud image has; like root in all but the name.
        with (self.etc / "passwd").open("a") as file:
            file.write("ubuntu:x:0:0::/root:/bin/bash\n")
        key = self.lab.folder / "host_key"
        shutil.copy(key, self.etc / "lab" / "host_key")
        quoted = " ".join('"' + f"{k}={v}".replace('"', '\\"') + '"' for k, v in env.items())
        (self.etc / "lab" / "sshd_config").write_text(
            "HostKey /etc/lab/host_key\nListenAddress 0.0.0.0\nPort 22\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\nUseDNS no\n"
            "MaxStartups 100\nMaxSessions 100\n"
            f"Subsystem sftp /usr/lib/openssh/sftp-server\nSetEnv {quoted}\n"
        )
        (self.root / ".bashrc").write_text("")
        self.authorize((self.lab.folder / "key.pub").read_text())
        if environment:
            folder = self.root / "bgray-env"
            folder.mkdir()
            for part in ("bin", "lib", "pyvenv.cfg"):
                (folder / part).symlink_to(Path(sys.prefix) / part)
        for name, content in home_files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            path.chmod(0o600)

    def _boot(self, extra_ips):
        pins = {str(REPOSITORY), sys.prefix, sys.base_prefix}
        env = os.environ | {
            "NAME": self.name,
            "HOST": str(self.folder),
            "SHARED_FOLDER": str(self.lab.shared),
            "PINS": "\n".join(sorted(pins)),
        }
        namespaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        with self.log.open("w") as log:
            self._process = self.lab.spawn(
                ["unshare", *namespaces, "bash", "-c", INIT],
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        # nsenter, then unshare, then the host's first process
        self.pid = _child(_child(self._process.pid, self._process), self._process)
        end = time.monotonic() + 60  # under a second on an idle machine
        while "\tunshare" in Path(f"/proc/{self.pid}/status").read_text().split("\n")[0]:
            assert time.monotonic() < end, f"{self.name} did not start"
            time.sleep(0.005)
        self.lab.ip(
            f"link add {self.link} type veth peer name eth0 netns {self.pid}",
            f"link set {self.link} master br0 up",
        )
        addresses = [f"addr add {self.ip}/16 dev eth0"]
        addresses += [f"addr add {ip}/32 dev eth0" for ip in extra_ips if ip]
        _ip(
            self.pid,
            "link set lo up",
            *addresses,
            "link set eth0 up",
            "route add default dev eth0",
        )
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()
        while "Server listening" not in self.log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"host {self.name} did not boot:\n{self.log.read_text()}")
            time.sleep(0.01)
        self.alive = True

    def authorize(self, public_key: str) -> None:
        """Lets the holder of the private key in as root and as ubuntu."""
        with (self.root / ".ssh" / "authorized_keys").open("a") as file:
            file.write(public_key.strip() + "\n")

    def popen(self, command: str, **options) -> subprocess.Popen:
        """Starts a shell command in the host's HOME, as a login shell that has read ~/.bashrc.

        What it returns is outside the host: end the command with `host.signal(process)`.
        """
        assert self.alive, f"host {self.name} is off"
        script = f"cd ~; [ -f ~/.bashrc ] && . ~/.bashrc\n{command}"
        clean = {"HOME": "/root", "USER": "root", "TERM": "dumb", "LANG": "C.UTF-8", "PATH": WHERE}
        spaces = ["--mount", "--net", "--uts", "--ipc", "--pid"]
        shell = ["setsid", "setpriv", "--pdeathsig", "KILL", "bash", "--login", "-c", script]
        options = {"stdin": subprocess.DEVNULL, "text": True, "env": clean, "cwd": "/"} | options
        enter = ["nsenter", "-t", str(self.pid), *spaces, "--"]
        process = subprocess.Popen([*enter, *shell], **options)
        self.lab.started.append(process)
        return process

    def signal(self, process: subprocess.Popen, sig: int = signal.SIGTERM) -> None:
        """Signals what `popen` started: the command and its children, not daemons it left."""
        while process.poll() is None:
            with contextlib.suppress(ProcessLookupError, RuntimeError):
                return os.killpg(_child(process.pid, process), sig)
            time.sleep(0.01)  # it has ended, or is not yet the leader of its group

    def run(self, command: str, *, timeout: float = 60.0, check: bool = True):
        """Runs a shell command; CompletedProcess with `stdout` and `stderr` as text.

        AssertionError with all it printed when it fails (unless `check=False`) or takes longer
        than `timeout` seconds.
        """
        # Files, not pipes: a daemon that keeps its output open would hold up the end of a pipe.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.popen(command, stdout=out, stderr=err)
            try:
                wrong = process.wait(timeout=timeout) and f"ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                check, wrong = True, f"ran longer than {timeout:g} s"
                self.signal(process, signal.SIGKILL)
                process.wait(timeout=30)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.buffer.read().decode(errors="replace"))
        if check and wrong:
            raise AssertionError(f"{self.name}: {command}\n{wrong}\n{texts[0]}\n{texts[1]}")
        return subprocess.CompletedProcess(command, process.returncode, *texts)

    def processes(self) -> list[tuple[int, str]]:
        """(pid inside the host, command line) of everything but what makes it a host."""
        found = []
        with contextlib.suppress(OSError):
            space = os.readlink(f"/proc/{self.pid}/ns/pid")
            for pid in _processes():
                with contextlib.suppress(OSError):
                    if pid == self.pid or os.readlink(f"/proc/{pid}/ns/pid") != space:
                        continue
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    status = Path(f"/proc/{pid}/status").read_text()
                    inside = status.split("NSpid:")[1].split("\n")[0].split()[-1]
                    if line.strip() != "sleep 3600" and "[listener]" not in line:
                        found.append((int(inside), line.strip()))
        return sorted(found)

    def kill(self, *, silent: bool = False) -> None:
        """Power off. Peers see their connections closed, as when a kernel ends its processes;
        with `silent` the cable is cut first, and they see nothing at all."""
        if self.alive:
            self.alive = False
            if silent:
                self.lab.partition(self)
            _kill(self.pid)
            self._process.wait(timeout=60)


class Lab:
    """Hosts on a bridge without a way out, as a context manager.

    Everything is under `folder` (made, and removed at the end). Needs root; see `missing`.
    BGRAY_LAB_KEEP=1 in the environment leaves the folder, with each host's /tmp/ray logs.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder or tempfile.mkdtemp(prefix="bgray-lab-")).resolve()
        self.shared = self.folder / "shared"
        self.hosts: dict[str, Host] = {}
        self.links = itertools.count(1)
        self._lock = threading.Lock()
        self._closers = []
        self.started: list[subprocess.Popen] = []
        self._keeper = None
        self._entry = None

    def __enter__(self):
        sweep_up()
        self.shared.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self):
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid"]
        command += ["--fork", "--kill-child", "bash", "-c", KEEPER]
        pipe = subprocess.PIPE
        with (self.folder / "keeper.log").open("w") as log:
            self._keeper = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, cwd="/")
        assert self._keeper.stdout
        if self._keeper.stdout.readline() != b"ready\n":
            said = (self.folder / "keeper.log").read_text()
            raise RuntimeError(f"no namespaces to be had: {said.strip()}")
        self.pid = _child(self._keeper.pid, self._keeper)
        REGISTRY.mkdir(exist_ok=True)
        entry = REGISTRY / f"{os.getpid()}-{next(_count)}.json"
        owner, keeper = (os.getpid(), _stat(os.getpid())[1]), (self.pid, _stat(self.pid)[1])
        entry.write_text(json.dumps({"owner": owner, "keeper": keeper, "folder": str(self.folder)}))
        self._entry = entry
        self.ip(
            "link set lo up",
            # Without an address of its own it has the lowest of the hosts', which changes as they
            # come and go; nobody reaches the gateway for the next minute then.
            "link add br0 address 02:00:00:00:00:01 type bridge",
            f"addr add {GATEWAY}/16 dev br0",
            "link set br0 up",
            "route add default dev br0",  # made-up public addresses are on the bridge as well
        )
        for name in ("key", "host_key"):
            path = self.folder / name
            if not path.exists():
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"]
                subprocess.run([*command, str(path)], check=True)

    def ip(self, *commands: str) -> None:
        """Runs `ip` commands in the network namespace of the bridge."""
        _ip(self.pid, *commands)

    def spawn(self, command: list[str], **options) -> subprocess.Popen:
        """Starts a process beside the hosts: on the bridge, with the real file system."""
        enter = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", "--"]
        process = subprocess.Popen([*enter, *command], **({"cwd": "/"} | options))
        self.started.append(process)
        return process

    @contextlib.contextmanager
    def network(self, host: Host | None = None):
        """Inside, the calling thread's new sockets are on the bridge (or in a host)."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        other = os.open(f"/proc/{host.pid if host else self.pid}/ns/net", os.O_RDONLY)
        try:
            _setns(other)
            try:
                yield
            finally:
                _setns(own)
        finally:
            os.close(own)
            os.close(other)

    def host(
        self,
        name: str,
        ip: str,
        extra_ips: tuple[str, ...] = (),
        *,
        env: dict[str, str] | None = None,
        home_files: dict[str, str] | None = None,
        environment: bool = True,
    ) -> Host:
        """Boots a host (under a second) with sshd on all its addresses.

        env: what every shell and ssh command there has. home_files: texts under its HOME.
        environment: whether ~/bgray-env is there and on PATH from the start; without it, the host
        is as bare as a fresh cloud machine and setup.sh has to do it.
        """
        with self._lock:
            host = Host(self, name, ip, extra_ips, env or {}, home_files or {}, environment)
            self.hosts[name] = host
            return host

    def laptop(self, ip: str = "10.77.0.2", *, env: dict[str, str] | None = None) -> Host:
        """The host people sit at: the private key (~/.ssh/id_ed25519), a cluster token
        (~/.ray/auth_token) and a copy of the project in ~/project."""
        files = {
            ".ssh/id_ed25519": (self.folder / "key").read_text(),
            ".ray/auth_token": secrets.token_hex(32),
        }
        host = self.host("laptop", ip, env=env, home_files=files)
        project = host.root / "project"
        project.mkdir()
        for name in ("bgray", "cluster", "sweeps"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, project / name, ignore=ignore)
        for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
            shutil.copy(REPOSITORY / name, project / name)
        return host

    def partition(self, host: Host) -> None:
        """Pulls the host's cable; it runs on."""
        self.ip(f"link set {host.link} down")

    def heal(self, host: Host) -> None:
        """Puts the cable back."""
        self.ip(f"link set {host.link} up")

    def at_close(self, function) -> None:
        """Calls function() before the hosts go, last added first."""
        self._closers.append(function)

    def logs(self, lines: int = 30) -> str:
        """The ends of each host's console and of Ray's autoscaler's logs, for a failed test."""
        texts = []
        for host in self.hosts.values():
            found = sorted(host.tmp.glob("ray/session_2*/logs/monitor.*"))
            found += [host.folder / "metadata.log", host.root / "bgray-spot.log"]
            for path in [host.log, *found, host.root / "uv.log"]:
                if path.is_file() and (text := path.read_text(errors="replace").strip()):
                    kept = [line for line in text.split("\n") if "Shared connection" not in line]
                    tail = "\n".join(line[:300] for line in kept[-lines:])
                    texts.append(f"--- {host.name}: {path.name}\n{tail}")
        return "\n".join(texts)

    def close(self) -> None:
        """Ends everything and removes the folder; a second call does nothing."""
        atexit.unregister(self.close)
        while self._closers:
            self._closers.pop()()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            # The end of a namespace's first process is that of all in it, and in those within;
            # `keeper` waits for that. (Killed itself, it would be gone before them.)
            if hasattr(self, "pid"):
                _kill(self.pid)
            else:
                keeper.kill()
            keeper.wait(timeout=60)
            keeper.stdin.close()
            keeper.stdout.close()
            for process in self.started:  # they end by themselves now; no zombies
                process.wait(timeout=60)
            for host in self.hosts.values():
                host.alive = False
        if not os.environ.get("BGRAY_LAB_KEEP"):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._entry is not None:
            self._entry.unlink(missing_ok=True)
            self._entry = None


def _setns(descriptor):
    if _libc.setns(descriptor, 0x40000000):  # CLONE_NEWNET; os.setns came with Python 3.12
        raise OSError(ctypes.get_errno(), "setns")


def _ip(pid, *commands):
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "--net", "ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"ip {'; '.join(commands)}: {done.stderr.strip()}")


def _script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def _replace(path, text):
    path.unlink(missing_ok=True)  # may be a link to a file of the machine
    path.write_text(text)
