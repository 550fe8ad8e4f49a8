"""Reads sweeps' folders for those who show them: again and again, but only files that changed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bgray import leases, storage
from bgray.curves import AT_A_TIME, Curves
from bgray.holder import alive, process
from bgray.problems import ConfigError
from bgray.records import ITEMS, read_info
from bgray.results import Driver, Memory, Results, Trial
from bgray.storage import Stamp
from bgray.variants import (
    MANIFEST,
    Run,
    Variant,
    as_variants,
    read_experiment,
    read_manifest,
)

SKIPPED = ("checkpoint",)
"""Folders of a run that nobody looks into."""
RUN, EXPERIMENT = "run.json", "experiment.yaml"
WHO = ("what", "host", "pid", "command", "started")
"""What of a lease is shown."""


def sweeps(url: str) -> list[str]:
    """Folders of sweeps: the one given, or those in it. ConfigError where there is none."""
    url = url.rstrip("/")
    stamps = storage.stamps(url, skip=(*SKIPPED, "clips"))
    # A run's own folder is no sweep: the sweep is what holds it.
    if RUN in stamps:
        text = f"is one run; give its sweep's folder, {url.rpartition('/')[0] or '.'}"
        raise ConfigError(url, [("", text)])
    depth = {path.count("/") for path in stamps if path.endswith(f"/{RUN}")}
    if MANIFEST in stamps or 1 in depth:
        return [url]
    found = {
        path.split("/")[0]
        for path in stamps
        if path.count("/") == 1
        and path.endswith(f"/{MANIFEST}")
        or path.count("/") == 2
        and path.endswith(f"/{RUN}")
    }
    if not found:
        text = "holds no sweep; give a sweep's folder (results/quickstart), or one of sweeps"
        raise ConfigError(url, [("", text)])
    return [storage.join(url, name) for name in sorted(found)]


class Reader:
    """One sweep's folder, local or on S3."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._stamps: dict[str, Stamp] = {}
        self._kept: dict[str, tuple[Stamp | None, Any]] = {}
        self._made: dict[str, tuple[Any, Run]] = {}
        self._damaged: dict[str, str] = {}
        self._curves, self._memory = Curves(self.url), Memory()
        self._lease: tuple[Stamp, bytes, float] | None = None
        self._seen: Any = None
        self._results: Results | None = None
        self._lock = threading.Lock()

    def read(self) -> Results:
        """As it is now; the same object as before where nothing has changed. For any thread.

        ConfigError where the folder holds neither run nor sweep, or sweep.json is damaged; of a
        damaged run `problems` tells.
        """
        with self._lock:
            stamps = storage.stamps(self.url, skip=SKIPPED)
            driver = self._driver(stamps.pop(leases.NAME, None))
            self._stamps = self._curves.stamps = stamps
            problems: list[str] = []
            runs = self._runs(problems)
            dead = {id for id, run in runs.items() if _is_dead(run.info, driver)}
            seen = (stamps, driver, dead, problems)
            if self._results is None or seen != self._seen:
                self._results = self._build(runs, driver, dead, problems)
                self._seen = seen
            return self._results

    def _cached(self, path: str, read: Callable[[str], Any]) -> Any:
        """What `read` makes of a file; None where there is no such file. A ConfigError it raises
        is kept as well: a damaged file is not read again before it has changed."""
        stamp = self._stamps.get(path)
        if stamp is None:
            return None
        if path not in self._kept or self._kept[path][0] != stamp:
            try:
                self._kept[path] = stamp, read(storage.join(self.url, path))
            except FileNotFoundError:  # gone since it was listed
                return None
            except ConfigError as error:
                self._kept[path] = stamp, error
        found = self._kept[path][1]
        if isinstance(found, ConfigError):
            raise found
        return found

    def _runs(self, problems: list[str]) -> dict[str, Run]:
        ids = sorted(id for id, _, name in (p.partition("/") for p in self._stamps) if name == RUN)
        for kept in self._kept.keys() - self._stamps.keys():  # deleted since
            del self._kept[kept]
        for kept in self._made.keys() - set(ids):
            del self._made[kept]
        self._damaged = {}
        found = {}
        for id, run in zip(ids, self._each(ids), strict=True):
            if isinstance(run, ConfigError):
                problems.append(str(run))
                said = str(run).replace(f"{self.url}/{id}/", "")
                self._damaged[id] = " ".join(said.split())
            elif run is not None:
                found[id] = run
        return found

    def _each(self, ids: list[str]) -> list["Run | ConfigError | None"]:
        """Several at a time where each takes long to come."""
        if storage.is_remote(self.url) and len(ids) > 1:
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                return list(pool.map(self._run, ids))
        return [self._run(id) for id in ids]

    def _run(self, id: str) -> "Run | ConfigError | None":
        stamps = tuple(self._stamps.get(f"{id}/{name}") for name in (RUN, EXPERIMENT, ITEMS))
        known = self._made.get(id)
        if known and known[0] == stamps:
            return known[1]
        try:
            info = self._cached(f"{id}/{RUN}", lambda _: read_info(storage.join(self.url, id)))
            experiment = self._cached(f"{id}/{EXPERIMENT}", read_experiment)
            items = self._cached(f"{id}/{ITEMS}", _items) or {}
        except ConfigError as error:
            return error
        if info is None or experiment is None:  # it is just being written
            return None
        run = Run(storage.join(self.url, id), info, experiment, items)
        self._made[id] = stamps, run
        return run

    def _build(
        self, runs: dict[str, Run], driver: Driver, dead: set[str], problems: list[str]
    ) -> Results:
        listing = self._cached(MANIFEST, lambda _: read_manifest(self.url))
        if not runs and not listing:
            text = "holds no sweep and no run; give a sweep's folder, such as results/quickstart"
            raise ConfigError(self.url, [("", "\n".join([text, *problems]))])
        found, name, baseline = as_variants(self.url.rsplit("/", 1)[-1], runs, listing)
        inside: dict[str, dict[str, Stamp]] = {}
        for path, stamp in self._stamps.items():
            id, slash, rest = path.partition("/")
            if slash:
                inside.setdefault(id, {})[rest] = stamp
        trials = []
        for variant in found:
            for seed, id in _ids(variant, listing or {}):
                trial = self._trial(variant, seed, id, runs.get(id), inside.get(id, {}), id in dead)
                trials.append(trial)
        return Results(
            self.url,
            name,
            found,
            baseline,
            trials,
            driver,
            listing or {},
            self._curves,
            problems,
            self._memory,
        )

    def _trial(
        self,
        variant: Variant,
        seed: int,
        id: str,
        run: Run | None,
        files: dict[str, Stamp],
        dead: bool,
    ) -> Trial:
        info = run.info if run else {}
        state, reason = info.get("state", "waiting"), info.get("reason") or ""
        if id in self._damaged:
            state, reason = "damaged", self._damaged[id]
        if dead:
            state, reason = "interrupted", "its process has died; the same command goes on with it"
        return Trial(
            id,
            variant.id,
            seed,
            variant.label,
            storage.join(self.url, id),
            state,
            reason,
            run,
            tuple(sorted(name[len("clips/") :] for name in files if name.startswith("clips/"))),
            max((stamp.changed for stamp in files.values()), default=None),
        )

    def _driver(self, stamp: Stamp | None) -> Driver:
        """Of the lease, whose heartbeat shows whether a process on another machine lives."""
        if stamp is None:
            self._lease = None
            return Driver("none", {})
        if self._lease is None or self._lease[0] != stamp:
            try:
                raw = storage.read_bytes(storage.join(self.url, leases.NAME))
            except FileNotFoundError:
                return Driver("none", {})
            self._lease = stamp, raw, time.monotonic()
        _, raw, since = self._lease
        fate, facts = leases.holder(raw)
        who = {key: facts.get(key) for key in WHO}
        pace = leases.REMOTE if storage.is_remote(self.url) else leases.LOCAL
        silent = time.monotonic() - since > pace.dead_seconds
        dead = fate == "gone" or (fate == "unknown" and silent)
        return Driver("dead" if dead else "running", who)


def _items(url: str) -> dict[int, dict[str, list[float | None]]]:
    """As `Run.scores`: the same object while the file is the same."""
    return Run(url.rpartition("/")[0], {}).scores


def _ids(variant: Variant, listing: dict[str, Any]) -> list[tuple[int, str]]:
    """(seed, run id) of all its trials, those too that have not begun."""
    runs = listing.get("variants", {}).get(variant.id, {}).get("runs")
    if runs is None:
        return [(seed, run.id) for seed, run in sorted(variant.runs.items())]
    return sorted((int(seed), id) for seed, id in runs.items())


def _is_dead(info: dict[str, Any], driver: Driver) -> bool:
    """Whether run.json says that it is running, and it is not."""
    if info.get("state") != "running" or driver.state == "running":
        return False
    last = (info.get("attempts") or [{}])[-1]
    if last.get("host") == leases.here()["host"]:
        return last.get("pid") != process()["pid"] and alive(info) is None
    return driver.state == "dead"
