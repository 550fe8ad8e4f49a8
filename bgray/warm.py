"""Makes a process that has trained one trial fit for the next: what the first one changed is put
back, and a process that cannot be cleaned is not used again."""

import contextlib
import ctypes
import gc
import logging
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from bgray import retries
from bgray.problems import first_line

LEFT_BYTES = 8 * 1024**2
"""Of GPU memory that tensors may hold before a trial: a seed, a flag; anything more would count as
the trial's own."""
PATIENCE_SECONDS = 10.0
"""For threads of the trial before to end."""
OURS = "bgray-"
"""What the names of our own threads begin with; those of libraries (pools, loops) may stay."""


SWITCH = "BGRAY_WARM"
"""Environment variable: 0 gives every trial of a sweep a new process."""


def wanted() -> bool:
    """Whether this command's trials may share processes."""
    return os.environ.get(SWITCH, "1") != "0"


class NotClean(RuntimeError):
    """This process should train no other trial. Tune starts the trial in a new one."""


class _Process:
    """What is known of this process."""

    before: "_Settings | None" = None
    """As they were before its first trial."""
    worn = ""
    """Why it should not be used again."""
    kept: "dict[Hashable, tuple[Any, int]]" = {}  # noqa: RUF012 (of the process, not of an object)


def ready() -> bool:
    """Call before each trial, in its thread: cleans up after the one before. True where there was
    one: the process is warm. Raises NotClean where something of it is left."""
    if _Process.before is None:
        _Process.before = _Settings()
        return False
    if not _Process.worn:
        _Process.worn = _unended() or _released()
    if _Process.worn:
        raise NotClean(_Process.worn)
    _Process.before.put_back()
    retries.forget()
    if not gc.get_freeze_count():
        gc.freeze()  # the modules, which every collection would go through: a third of a second
    return True


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Around a trial: an error in it wears the process out, for nobody knows what it left half
    done. The exceptions of a trial that ended early on purpose are none."""
    try:
        yield
    except Exception as error:
        wear_out(f"the trial before ended with {type(error).__name__}", error)
        raise
    finally:
        if _on_gpu():  # until its next trial the process should not sit on what others may need
            gc.collect()
            _empty_gpu_cache()


def wear_out(why: str, error: BaseException | None = None) -> None:
    """This process trains no other trial. A loss that is not finite is an error on a GPU only: on
    a CPU there is nothing that it could leave."""
    if type(error).__name__ == "NotFinite" and not _on_gpu():
        return
    _Process.worn = _Process.worn or why


def _on_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


# --- what is left


def _unended() -> str:
    """Threads of ours that the trial before has left behind, in words; waits a little for them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    here = threading.current_thread()
    for thread in threading.enumerate():
        if thread.name.startswith(OURS) and thread is not here:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                return f"a thread of the trial before ({thread.name}) does not end"
    return ""


def _released() -> str:
    """Gives memory back, on the GPU and off it; why that did not do, in words."""
    torch = sys.modules.get("torch")
    if "torch._dynamo" in sys.modules:
        # Compiled code belongs to a function and not to a model: without this, the eighth trial
        # that compiles it would silently run without compilation. The files stay on disk.
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.backends.cuda.cufft_plan_cache.clear()
            _empty_gpu_cache()
        except RuntimeError as error:  # the context itself is broken
            return f"its GPU answers with '{first_line(error)}'"
        if (left := torch.cuda.memory_allocated()) > LEFT_BYTES:
            return f"{left / 1024**2:.0f} MiB of GPU memory are left of the trial before"
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return ""


def _empty_gpu_cache() -> None:
    if _on_gpu():
        with contextlib.suppress(RuntimeError):
            sys.modules["torch"].cuda.empty_cache()


class _Settings:
    """What a trial may set for its whole process, as found when this was made."""

    def __init__(self) -> None:
        import torch
        import torch.utils.deterministic

        self._torch = [(get, put, get()) for get, put in _switches(torch)]
        self._hooks = [(hooks, dict(hooks)) for hooks in _hooks()]
        self._environment, self._filters = dict(os.environ), list(warnings.filters)
        self._numpy = np.geterr()
        self._loggers = [(logger, logger.level, list(logger.handlers)) for logger in _loggers()]
        self._trace, self._profile = sys.gettrace(), sys.getprofile()

    def put_back(self) -> None:
        import torch

        for get, put, value in self._torch:
            if get() != value:  # some import half of torch when they are set
                put(value)
        for hooks, content in self._hooks:
            hooks.clear()
            hooks.update(content)
        # One by one, and only what differs: threads of libraries read it meanwhile.
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        for name, text in self._environment.items():
            if os.environ.get(name) != text:
                os.environ[name] = text
        warnings.filters[:] = self._filters  # type: ignore[index]
        np.seterr(**self._numpy)
        for logger, level, handlers in self._loggers:
            if logger.level != level:
                logger.setLevel(level)
            logger.handlers[:] = handlers
        sys.settrace(self._trace)
        sys.setprofile(self._profile)
        torch.clear_autocast_cache()
        torch.seed()
        random.seed()
        np.random.seed()  # noqa: NPY002 (a new process has one from the system, too)


def _switches(torch: Any) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """(getter, setter) of what torch keeps for a whole process."""
    backends, cudnn = torch.backends, torch.backends.cudnn
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield torch.get_num_threads, torch.set_num_threads
    yield (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    )
    yield torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly
    for place, name in (
        *((cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
        (backends.mkldnn, "enabled"),
        (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        (backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ):
        yield _attribute(place, name)


def _attribute(place: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(place, name), lambda value: setattr(place, name, value)


def _hooks() -> list[dict[int, Any]]:
    """Of every module and every optimizer of the process."""
    # torch.optim hides the second one's name.
    places = [import_module(name) for name in ("torch.nn.modules.module", "torch.optim.optimizer")]
    return [
        hooks
        for place in places
        for name, hooks in vars(place).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    ]


def _loggers() -> list[logging.Logger]:
    known = list(logging.Logger.manager.loggerDict.values())
    return [logging.getLogger(), *(each for each in known if isinstance(each, logging.Logger))]


# --- what trials share


KEPT_BYTES = 512 * 1024**2
"""Of what `kept` remembers; beyond it, what was asked for longest ago is forgotten."""


def kept(key: Hashable, make: Callable[[], Any], num_bytes: Callable[[Any], int]) -> Any:
    """What `make` returned when this process was first asked for `key`: nobody may change it.

    For work that depends on its key alone and that every trial of a sweep would do again.
    num_bytes: the size of what was made. Only where `ready` was called: others train one run.
    """
    if _Process.before is None:
        return make()
    found = _Process.kept.pop(key, None)
    if found is None:
        value = make()
        found = value, num_bytes(value)
    _Process.kept[key] = found  # last: asked for most recently
    while sum(size for _, size in _Process.kept.values()) > KEPT_BYTES:
        _Process.kept.pop(next(iter(_Process.kept)))
    return found[0]
