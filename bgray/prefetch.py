"""Runs the stream of batches in a thread, a few ahead, and says so when none comes."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bgray.data import Batch


class Prefetched:
    """Runs an iterator of batches in a thread, a few ahead, and says why when nothing comes for a
    while.

    on_stall(seconds) is called each time `stall_seconds` pass without a batch; after 20 of them,
    TimeoutError.
    Errors of the iterator are raised where the batch is asked for. Use as a context manager:
    leaving stops the thread.
    stop: asked while nothing comes; once it is true the stream ends, and `asked` is true.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        *,
        ahead: int = 4,
        stall_seconds: float = 30.0,
        on_stall: Callable[[float], None] = lambda seconds: None,
        stop: Callable[[], object] = lambda: False,
    ):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._batches, self._stall_seconds, self._on_stall = batches, stall_seconds, on_stall
        self._ask, self.asked = stop, False
        self._thread = threading.Thread(target=self._work, name="bgray-feed", daemon=True)

    def __enter__(self) -> "Prefetched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(timeout=10)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False

    def _work(self) -> None:
        try:
            for batch in self._batches:
                if not self._put(batch):
                    break
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            close = getattr(self._batches, "close", None)
            if close:
                close()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _get(self) -> Any:
        for stalls in range(1, 21):
            deadline = time.monotonic() + self._stall_seconds
            while (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(queue.Empty):
                    return self._queue.get(timeout=min(1.0, left))
                if self._ask():
                    self.asked = True
                    return None
            self._on_stall(stalls * self._stall_seconds)
        raise TimeoutError(
            f"no batch for {20 * self._stall_seconds:.0f} s; see the reasons given above"
        )
