"""Where a run ran, and from which code: enough to run it again."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DIFF_LIMIT = 20_000  # characters of uncommitted changes that a record keeps
PACKAGES = (
    "torch",
    "torchaudio",
    "ray",
    "numpy",
    "pyarrow",
    "auraloss",
    "heavyball",
    "soundfile",
    "soxr",
)


def machine() -> dict[str, Any]:
    """Host, CPU, GPU, package versions, commit and uncommitted changes: enough to run it again."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        **git(),
    }
    import torch  # here, so that reading records needs no torch

    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return facts


def changes_apart(facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Uncommitted changes out of `machine`'s facts, which then name a file (`changes`, None where
    there are none) that holds them: (facts, {file name: content}). However often a run is started
    again, each state of the code is kept once."""
    code = {
        key: facts[key] for key in ("dirty_diff", "dirty_diff_cut", "new_files") if key in facts
    }
    rest = {key: value for key, value in facts.items() if key not in code}
    if not any(code.values()):
        return {**rest, "changes": None}, {}
    content = json.dumps(code, indent=1).encode() + b"\n"
    name = f"changes-{hashlib.sha256(content).hexdigest()[:12]}.json"
    return {**rest, "changes": name}, {name: content}


def news(facts: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of one more attempt that differ from the last one that said them; host and commit
    always."""
    known: dict[str, Any] = {}
    for attempt in earlier:
        known |= attempt
    always, missing = ("host", "commit"), object()
    return {k: v for k, v in facts.items() if k in always or known.get(k, missing) != v}


def git() -> dict[str, Any]:
    """Commit, uncommitted changes and new files of the checkout that bgray runs from, as far as
    they fit; empty outside of one (an installed package within another project's repository)."""
    here = Path(__file__).resolve().parent.parent

    def run(*args: str) -> str | None:
        command = ["git", "-C", str(here), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            return None
        return done.stdout if done.returncode == 0 else None

    top, commit = run("rev-parse", "--show-toplevel"), run("rev-parse", "HEAD")
    if top is None or commit is None or Path(top.strip()).resolve() != here:
        told = os.environ.get(COMMIT)
        return {"commit": told} if told else {}
    diff = run("diff", "HEAD") or ""
    names = (run("ls-files", "--others", "--exclude-standard") or "").splitlines()
    new = {}
    for name in names[:50]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            new[name] = (here / name).read_text()[:DIFF_LIMIT]
    return {
        "commit": commit.strip(),
        "dirty_diff": diff[:DIFF_LIMIT],
        "dirty_diff_cut": len(diff) > DIFF_LIMIT,
        "new_files": new if sum(map(len, new.values())) <= DIFF_LIMIT else names,
    }


COMMIT = "BGRAY_COMMIT"


def commit_for_the_machines() -> dict[str, str]:
    """The environment by which a cluster's machines, which have the code without its repository,
    know the commit; empty where there is none here either."""
    found = git()
    if "commit" not in found:
        return {}
    changed = found.get("dirty_diff") or found.get("new_files")
    return {COMMIT: found["commit"] + (" and uncommitted changes" if changed else "")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
