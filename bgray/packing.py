"""Which trials share a GPU: what each holds of its memory, measured by a probe, learnt from runs
that went well and from those that had too little."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bgray import storage
from bgray.config import ConfigError, Experiment
from bgray.resources import CONTEXT_GIB, Plan, Share

FILE = "vram.json"
MARGIN, MORE_GIB = 0.1, 0.3
"""On top of what was measured: fragments that grow, libraries that load later."""

Vram = Literal["auto"] | float


@dataclass(frozen=True)
class Peak:
    """What trials of one cost were seen to hold on a GPU."""

    gib: float
    """Peak held by torch's allocator (reserved)."""
    source: Literal["probe", "run", "oom"]
    overhead_gib: float = CONTEXT_GIB
    """Besides: the CUDA context."""
    at_least: bool = False
    """It ran out of memory: it needs more than this, nobody knows how much."""
    hopeless: bool = False
    """It did so with a GPU of its own."""
    gpu: str = ""
    """The GPU's name, where it is known."""


class Packer:
    """Knows the peaks of a sweep's trials, and says what to give each. Remembers in `vram.json`
    beside the runs; one thread of one process, the driver, may hold it. Tune pickles it.

    url: the sweep's folder. vram: `runtime.vram`: "auto", or GiB per trial as a person gave it.
    Keys are `rehearsal.cost_key`s: seeds and learning rates share one.
    """

    def __init__(self, url: str, vram: Vram = "auto"):
        self._url = storage.join(url, FILE)
        self.vram: Vram = vram
        self.gpu_gib: float | None = None
        """Size of the smallest GPU of those that trials may come to run on; None: not known."""
        self.peaks: dict[str, Peak] = {}
        try:
            known = json.loads(storage.read_bytes(self._url))
            self.gpu_gib = known["gpu_gib"]
            self.peaks = {key: Peak(**peak) for key, peak in known["peaks"].items()}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            text = f"is damaged ({error}); delete it, and the trials are measured anew"
            raise ConfigError(self._url, [("", text)]) from None

    # --- what it is asked ---

    def unknown(self, keys: Iterable[str], gpu: str = "") -> list[str]:
        """Those of `keys` that a probe should measure: not seen yet, or on another kind of GPU."""
        if self.vram != "auto":
            return []
        fresh = {key for key, peak in self.peaks.items() if peak.gpu in ("", gpu) or not gpu}
        return [key for key in dict.fromkeys(keys) if key not in fresh]

    def share(self, key: str) -> Share:
        """What a trial of this cost gets."""
        return share_of(self.peaks.get(key), self.gpu_gib, self.vram)

    def hopeless(self, key: str) -> bool:
        """Whether it has run out of memory with a GPU of its own: there is no more to give it."""
        peak = self.peaks.get(key)
        return peak is not None and peak.hopeless

    # --- what it is told ---

    def see_gpu(self, gib: float) -> None:
        """There is a GPU of this size; the smallest counts."""
        if self.gpu_gib is None or gib < self.gpu_gib:
            self.gpu_gib = gib
            self._write()

    def learn_probe(self, key: str, found: Mapping[str, Any]) -> None:
        """found: what `probe` returned."""
        self.see_gpu(found["gpu_gib"])
        overhead, gpu = found["overhead_gib"], found["gpu"]
        out = found["out_of_memory"]
        peak = Peak(found["vram_gib"], "oom" if out else "probe", overhead, out, out, gpu)
        self._keep(key, peak)

    def learn(self, key: str, info: Mapping[str, Any]) -> None:
        """What run.json says of a run that has just ended."""
        packed, timing = bool(info.get("packed")), info.get("timing") or {}
        if info.get("state") == "out_of_memory":
            self.learn_oom(key, info.get("oom") or {}, packed=packed)
        elif info.get("state") in ("finished", "stopped"):
            self.learn_run(key, timing.get("vram_reserved_gib"), packed=packed)

    def learn_run(self, key: str, reserved_gib: float | None, *, packed: bool) -> None:
        """A run that did not run out of memory held so much at most (timing.vram_reserved_gib).

        A packed one teaches nothing: its share was enough, and within a limit torch holds on to
        whatever it may. Of what runs alone held the largest stands; after one that ran out of
        memory, a run alone says what nobody knew.
        """
        known = self.peaks.get(key)
        enough = known is not None and not known.at_least and (reserved_gib or 0) <= known.gib
        if reserved_gib is None or packed or enough:
            return
        gib = max(reserved_gib, known.gib if known else 0.0)
        known = known or Peak(gib, "run")
        self._keep(
            key,
            dataclasses.replace(known, gib=gib, source="run", at_least=False, hopeless=False),
        )

    def learn_oom(self, key: str, oom: Mapping[str, float | None], *, packed: bool) -> bool:
        """A run ran out of memory; `oom` is run.json's. True: start it once more, it gets a GPU of
        its own. False: it had one, that is its result."""
        had = [oom.get("limit_gib"), oom.get("reserved_gib")]
        if oom.get("asked_gib") and oom.get("peak_gib"):
            had.append((oom["peak_gib"] or 0) + (oom["asked_gib"] or 0))
        known = self.peaks.get(key) or Peak(0.0, "oom")
        gib = max(known.gib, *(value or 0.0 for value in had))
        self._keep(
            key,
            dataclasses.replace(
                known,
                gib=round(gib, 3),
                source="oom",
                at_least=True,
                hopeless=known.hopeless or not packed,
            ),
        )
        return packed

    def _keep(self, key: str, peak: Peak) -> None:
        self.peaks[key] = peak
        self._write()

    def _write(self) -> None:
        peaks = {key: dataclasses.asdict(peak) for key, peak in self.peaks.items()}
        text = json.dumps({"gpu_gib": self.gpu_gib, "peaks": peaks}, indent=1)
        storage.write_bytes(self._url, text.encode() + b"\n")


def share_of(peak: Peak | None, gpu_gib: float | None, vram: Vram = "auto") -> Share:
    """What a trial with this peak gets of a GPU of this size (None: not known). More than half is
    all of it."""
    given = None if vram == "auto" else float(vram)
    if peak is not None and peak.at_least:
        return Share(1.0, None, None, f"ran out of memory with {peak.gib:.1f} GiB: alone")
    if given is None and peak is None:
        return Share(1.0, None, None, "its need is not known: alone")
    overhead = peak.overhead_gib if peak else CONTEXT_GIB
    need, why = given or 0.0, f"runtime.vram={given:g}" if given else ""
    if peak is not None and (given is None or peak.gib + overhead > given):
        need = (1 + MARGIN) * (peak.gib + overhead) + MORE_GIB
        measured = "a run" if peak.source == "run" else "a probe"
        why = f"{peak.gib + overhead:.2f} GiB in {measured}, with a margin"
    if not gpu_gib:
        return Share(1.0, need, None, f"{why}; the size of the GPUs is not known: alone")
    # Rounded up, or so many at a time would not fit as Ray counts them.
    fraction = math.ceil(round(100 * need / gpu_gib, 6)) / 100
    if fraction > 0.5:
        return Share(1.0, need, None, f"{why}: more than half of {gpu_gib:.0f} GiB, alone")
    return Share(fraction, need, max(need - overhead, 0.5 * need), why)


# --- on Ray


def prepare(
    ray: Any,
    experiments: Mapping[str, Experiment],
    plan: Plan,
    url: str,
    say: Callable[[str], None] = print,
) -> Packer | None:
    """The packer of a sweep, with everything measured that is not known yet: each unknown cost on
    a GPU of its own, as many at a time as there are GPUs. None where trials do not share GPUs.

    experiments: `cost_key` to one of those that cost the same. plan: made without shares. url: the
    sweep's folder.
    """
    runtime = next(iter(experiments.values())).runtime
    if runtime.vram == "whole" or not plan.gpus or runtime.workers > 1:
        return None
    packer = Packer(url, runtime.vram)
    seen = gpus(ray)
    packer.gpu_gib = None if seen else packer.gpu_gib  # a cluster's machines change
    for gib in seen.values():
        packer.see_gpu(gib)
    only = next(iter(seen)) if len(seen) == 1 else ""
    todo = packer.unknown(experiments, only)
    if todo:
        say(f"measuring the memory of {len(todo)} kinds of trial, one at a time on each GPU")
    for key, found in probe_all(ray, {key: experiments[key] for key in todo}, plan.threads):
        if isinstance(found, str):
            say(f"no figure for the memory of {key} ({found}): it gets a GPU of its own")
        else:
            packer.learn_probe(key, found)
    return packer


def gpus(ray: Any) -> dict[str, float]:
    """Name to GiB of the GPUs of the machines that are there: asked on one machine of each kind,
    for Ray itself does not know the sizes."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kinds: dict[Any, str] = {}
    for node in ray.nodes():
        has = node.get("Resources", {})
        if node["Alive"] and has.get("GPU", 0) > 0:
            kind = frozenset(name for name in has if name.startswith("accelerator_type:"))
            # Without a type, every machine may have another one.
            kinds.setdefault(kind or node["NodeID"], node["NodeID"])
    ask = ray.remote(num_gpus=0.01, num_cpus=0, max_calls=1)(gpu_here)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in kinds.values()]
    answers = ray.get([ask.options(scheduling_strategy=place).remote() for place in places])
    found: dict[str, float] = {}
    for name, gib in filter(None, answers):
        found[name] = min(gib, found.get(name, math.inf))
    return found


def gpu_here() -> tuple[str, float] | None:
    """Name and GiB of this process's GPU; None where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / 1024**3


def probe_all(
    ray: Any, experiments: Mapping[str, Experiment], threads: int
) -> Iterable[tuple[str, dict[str, Any] | str]]:
    """(key, what `probe` returned or why it failed), in the order in which they are done."""
    # A process of its own each: a warm one holds memory that is not the trial's.
    task = ray.remote(num_gpus=1, num_cpus=1, max_calls=1, max_retries=1)(probe)
    waiting = {task.remote(experiment, threads): key for key, experiment in experiments.items()}
    while waiting:
        done, _ = ray.wait(list(waiting))
        key = waiting.pop(done[0])
        try:
            yield key, ray.get(done[0])
        except Exception as error:
            from bgray.records import reason

            yield key, reason(error)


def probe(experiment: Experiment, threads: int = 1) -> dict[str, Any]:
    """What `experiment` holds on this process's GPU, which must be its own: peak of the allocator,
    the rest (context), the GPU's name and size in GiB, and whether it ran out of memory.

    Three training steps of a full batch and a validation item, on made-up data.
    """
    import torch

    from bgray import probes
    from bgray.context import Context, pick_device
    from bgray.rehearsal import rehearse
    from bgray.trial import is_out_of_memory

    device = pick_device("cuda")
    out = False
    try:
        rehearse(experiment, Context(device=device, threads=threads))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        out = True
    free, total = torch.cuda.mem_get_info(device)
    overhead = total - free - torch.cuda.memory_reserved(device)
    return {
        "vram_gib": probes.memory(device)["vram_reserved_gib"],
        "overhead_gib": round(overhead / probes.GIB, 3),
        "gpu": torch.cuda.get_device_name(device),
        "gpu_gib": total / probes.GIB,
        "out_of_memory": out,
    }
