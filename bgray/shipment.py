"""What of a sweep is given to a cluster: resolved here first, with all its mistakes at once."""

import dataclasses
import hashlib
import io
import os
import shlex
import zipfile
from pathlib import Path
from typing import Any

from bgray import storage
from bgray.config import Runtime
from bgray.document import read
from bgray.problems import ConfigError
from bgray.remote import Cluster
from bgray.resources import CPU_WORKER


@dataclasses.dataclass(frozen=True)
class Spec:
    """A sweep as it is given to the cluster."""

    name: str
    file: str
    overrides: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What could not be checked from here, and what was settled."""

    @property
    def digest(self) -> str:
        """Of everything that the job is given: two with the same one are the same job."""
        text = Path(self.file).read_bytes() + repr(self.overrides).encode()
        return hashlib.sha256(text).hexdigest()[:16]

    @property
    def entrypoint(self) -> str:
        words = ["python", "-m", "bgray.sweep", Path(self.file).name]
        for item in self.overrides:
            words += ["--set", item]
        # exec: the signal that stops the job reaches Python and not a shell around it.
        return f"exec {shlex.join(words)}"

    def package(self) -> tuple[str, bytes]:
        """(name, ZIP) of the job's working directory: the sweep's YAML. Its bytes depend on
        nothing else."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            entry = zipfile.ZipInfo(Path(self.file).name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, Path(self.file).read_bytes())
        data = buffer.getvalue()
        return f"_ray_pkg_{hashlib.sha1(data).hexdigest()}.zip", data


def package_digest() -> str:
    """Of this machine's bgray: equal where the same code is installed."""
    folder, content = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def prepare(cluster: Cluster, source: str, overrides: tuple[str, ...]) -> Spec:
    """Resolve the sweep here, with all its mistakes at once, before anything is started there.
    ConfigError also for folders that only one machine has."""
    raw = read(source)
    if "oracle" in raw:
        return _prepare_oracle(raw, source, overrides)
    from bgray.experiment import read_overridden

    raw = read_overridden(source, overrides)
    runtime, data = _section(raw, "runtime"), _section(raw, "data")
    path = str(data.get("path", "builtin"))
    results = str(runtime.get("results", Runtime.results))
    problems = _one_machines("runtime.results", results)
    if path != "builtin":
        problems += _one_machines("data.path", path)
    elif "cache" in runtime:
        problems += _one_machines("runtime.cache", str(runtime["cache"]))
    elif not problems:
        overrides += (f"runtime.cache={storage.join(results, '.cache')}",)
    if problems:
        raise ConfigError(source, problems)
    if "data_nodes" not in runtime and CPU_WORKER in cluster.node_types:
        overrides += (f"runtime.data_nodes={CPU_WORKER}",)
    notes = [f"results: {storage.join(results, str(raw['name']))}"]
    if not storage.is_remote(results) and cluster.on_aws:
        notes.append(f"{results} must be a folder that the head and all workers share")
    trials, unchecked = _resolve(source, overrides, path)
    notes = [f"{trials} trial{'s' * (trials != 1)}, {notes[0]}", *notes[1:]]
    if unchecked:
        notes.append(f"{path} cannot be reached from here: whether it fits is checked on the head")
    return Spec(str(raw["name"]), source, overrides, tuple(notes))


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    found = raw.get(name)
    return found if isinstance(found, dict) else {}  # what else it may be, `_resolve` refuses


def _prepare_oracle(raw: dict[str, Any], source: str, overrides: tuple[str, ...]) -> Spec:
    from bgray import oracle
    from bgray.document import override

    override(raw, overrides, source)
    question = oracle.parse(raw, source)
    problems = _one_machines("oracle.results", question.oracle.results)
    if question.oracle.tracks != "builtin":
        problems += _one_machines("oracle.tracks", question.oracle.tracks)
    if problems:
        raise ConfigError(source, problems)
    url = storage.join(question.oracle.results, question.name)
    return Spec(question.name, source, overrides, (f"results: {url}",))


def _one_machines(key: str, path: str) -> list[tuple[str, str]]:
    """The problem of a path that means another folder on each machine, if it is one."""
    if storage.is_remote(path) or path.startswith("/"):
        return []
    text = f"{path!r} is a folder of one machine; give s3://bucket/prefix, or an absolute path"
    return [(key, f"{text} that all machines share (--set {key}=...)")]


def _resolve(source: str, overrides: tuple[str, ...], path: str) -> tuple[int, bool]:
    """(number of trials, whether the data could not be looked at)."""
    from bgray.search import expand, resolved

    if _can_be_read(path):
        return len(expand(source, overrides)[1]), False
    return len(resolved(source, overrides)[1]), True


def _can_be_read(path: str) -> bool:
    """Whether what is at `path` can be judged from this machine; what is not there on a storage
    that answers can."""
    if path == "builtin" or not storage.is_remote(path):
        return path == "builtin" or os.path.isdir(path)
    try:
        storage.exists(path)
    except OSError:  # no credentials here, or no way there: the cluster has its own
        return False
    return True
