"""One trial as its page shows it: what it is, what it warned of, how it ended, what it ran on."""

import io
import json
from typing import Any

from bgray import cells, storage
from bgray.problems import ConfigError
from bgray.records import METRICS
from bgray.results import Results, Trial, as_text

TAIL_BYTES, TAIL_LINES = 16 * 1024, 25
LONGEST = 64 * 1024  # characters of one file
SHORT_COMMIT = 10


def of(results: Results, trial: Trial) -> dict[str, Any]:
    """Plain data: `facts` and `machine` as [name, text], `changes` as [setting, the baseline's,
    this one's], `warnings` as text, `files` as [name, text], `attempts` as rows of text."""
    info = trial.info
    entry = next((e for e in results.entries if e.id == trial.variant), None)
    changes = entry.changes if entry else ()
    last = (info.get("attempts") or [{}])[-1]
    guards = [f"{kind}: {text}" for kind, text in (info.get("guards") or {}).items() if text]
    warnings = [str(text) for text in info.get("warnings") or []]
    return {
        "id": trial.id,
        "label": trial.label,
        "seed": trial.seed,
        "url": trial.url,
        "state": trial.state,
        "reason": trial.reason,
        "facts": _facts(results, trial),
        "changes": [[c.key, as_text(c.before), as_text(c.after)] for c in changes],
        "warnings": list(dict.fromkeys([*guards, *warnings])),
        "files": _files(trial),
        "attempts": [_attempt(one) for one in info.get("attempts") or []],
        "machine": _machine(info, last),
    }


def _facts(results: Results, trial: Trial) -> list[list[str]]:
    info, timing = trial.info, trial.info.get("timing") or {}
    found = [["folder", trial.url]]
    if trial.run is not None:
        found.append(["step", f"{results.progress(trial)} of {info.get('steps', '?')}"])
    for score, value in (info.get("metrics") or {}).items():
        if score != "step" and isinstance(value, int | float):
            found.append([score, f"{value:.4f}"])
    if info.get("parameters") is not None:
        found.append(["parameters", cells.millions(info["parameters"])])
    known = [
        ("training", timing.get("train_seconds"), lambda v: f"{v / 60:.1f} min"),
        ("steps per second", timing.get("steps_per_second"), lambda v: f"{v:.2f}"),
        ("waiting for data", timing.get("data_wait_share"), lambda v: f"{v:.1%}"),
        ("VRAM peak", timing.get("vram_peak_gib"), lambda v: f"{v:.2f} GiB"),
        ("RAM peak", timing.get("rss_peak_gib"), lambda v: f"{v:.2f} GiB"),
        ("converged", info.get("converged"), lambda v: "yes" if v else "no"),
        ("out of memory before", info.get("oom"), as_text),
        ("computed", info.get("choices"), _computed),
        ("units from the feed cache", (info.get("feed_cache") or {}).get("hit_rate"), _percent),
    ]
    return [*found, *([name, say(value)] for name, value, say in known if value is not None)]


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _computed(choices: dict[str, Any]) -> str:
    """`bf16, compile, cuda_graphs`: how its steps were computed."""
    used = [name for name in ("compile", "cuda_graphs", "recompute") if choices.get(name)]
    return ", ".join([str(choices.get("precision")), *used])


def _machine(info: dict[str, Any], last: dict[str, Any]) -> list[list[str]]:
    """Of the last attempt."""
    commit = str(last.get("commit") or "")[:SHORT_COMMIT]
    if commit and last.get("changes"):
        commit += " with uncommitted changes, in " + _changes(last["changes"])
    gpu = last.get("gpu") or ("none" if info.get("device") == "cpu" else None)
    facts = {
        "host": last.get("host"),
        "GPU": gpu if gpu is None or isinstance(gpu, str) else json.dumps(gpu),
        "device": info.get("device"),
        "shared its GPU": "yes" if info.get("packed") else None,
        "CPUs": last.get("cpus"),
        "platform": last.get("platform"),
        "python": last.get("python"),
        "commit": commit or None,
        "batches": info.get("feed_reason"),
        **(last.get("packages") or {}),
    }
    return [[name, str(value)] for name, value in facts.items() if value is not None]


def _changes(found: Any) -> str:
    return found if isinstance(found, str) else json.dumps(found)[:200]


def _attempt(one: dict[str, Any]) -> list[str]:
    """From step, begun, ended how, host."""
    keys = ("from_step", "started", "ended", "host")
    return [str(one.get(key) if one.get(key) is not None else cells.NOTHING) for key in keys]


def _files(trial: Trial) -> list[list[str]]:
    """What a person opens first when a run went wrong: why it failed, then its last lines."""
    found = []
    for name in ("error.txt", "diverged.json"):
        text = _text(storage.join(trial.url, name), LONGEST)
        if text:
            found.append([name, text])
    lines = _text(storage.join(trial.url, METRICS), TAIL_BYTES).splitlines()[-TAIL_LINES:]
    if lines:
        found.append([f"{METRICS}, last lines", "\n".join(lines)])
    return found


def _text(url: str, most: int) -> str:
    """The file's last `most` bytes, from a whole line on; empty where there is none."""
    try:
        if storage.is_remote(url):
            file: io.IOBase = storage.open_file(url)
        else:
            file = open(url, "rb")
        with file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - most))
            raw = file.read(most)  # type: ignore[attr-defined]
    except FileNotFoundError:
        return ""
    except (OSError, ConfigError) as error:
        return f"could not be read: {error}"
    text = raw.decode("utf-8", "replace")
    return text if size <= most else text.partition("\n")[2]
