"""One work unit as an Arrow IPC file: written in one pass, mapped into memory, and checked."""

import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Unit = tuple[np.ndarray, np.ndarray]
"""Inputs (n, B, C, T) and targets (n, B, S, C, T), int16."""

NAMES = ("inputs", "targets")
FRAME_BYTES = 8 * 1024
"""More than what a file holds besides the samples."""
PAGE, PAGES = 4096, 16
BLOCK = 2**20
ABOUT = b"bgray"


class Damaged(Exception):
    """Not the file that was written: cut short, overwritten, or of something else."""


def size_of(unit: Unit) -> int:
    """Bytes that its file has at most."""
    return sum(array.nbytes for array in unit) + FRAME_BYTES


def write(fd: int, unit: Unit, name: str) -> None:
    """The whole file, from the descriptor's position on, a row of it being a batch; OSError where
    there is no room.

    name: what it is, to be asked for again by `read`.
    """
    arrays = [np.ascontiguousarray(array, "<i2") for array in unit]
    about = {
        "name": name,
        "shapes": [array.shape for array in arrays],
        "sample": _sample(arrays),
        "whole": _whole(arrays),
    }
    columns = [
        pa.Array.from_buffers(pa.binary(array.nbytes // len(array)), len(array), [None, buffer])
        for array in arrays
        for buffer in [pa.py_buffer(array)]
    ]
    schema = pa.schema(
        [pa.field(name, column.type) for name, column in zip(NAMES, columns, strict=True)],
        metadata={ABOUT: json.dumps(about)},
    )
    # Arrow's own files are truncated when they are opened; this one has its room reserved.
    sink = pa.PythonFile(_Descriptor(fd), mode="w")
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


class _Descriptor:
    """What Arrow needs of a file to write to."""

    closed = False

    def __init__(self, fd: int):
        self._fd, self._at = fd, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        while view:
            done = os.write(self._fd, view)
            view, self._at = view[done:], self._at + done
        return 0

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path, name: str, *, whole: bool = False) -> Unit:
    """Its arrays: read-only, mapped, and valid also when the file is removed. FileNotFoundError;
    PermissionError; Damaged.

    whole: check every byte, in place of a few pages: a file that was written before the machine's
    last start may have lost any part of itself to a power cut.
    """
    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            about = json.loads((reader.schema.metadata or {})[ABOUT])
            if about["name"] != name:
                raise Damaged(f"{path} is of another unit")
            batch = reader.get_batch(0)
        unit = [
            _mapped(batch.column(column), shape)
            for column, shape in zip(NAMES, about["shapes"], strict=True)
        ]
        if whole:
            same = _whole(unit) == about["whole"]
        else:
            same = _sample(unit) == about["sample"]
    except (FileNotFoundError, PermissionError, Damaged):
        raise
    # What Arrow, JSON and numpy raise over bytes that are not what they should be.
    except (OSError, LookupError, TypeError, ValueError, MemoryError, pa.ArrowException) as error:
        raise Damaged(f"{path}: {error}") from error
    if not same:
        raise Damaged(f"{path}: other bytes than were written")
    return unit[0], unit[1]


def _mapped(column: pa.Array, shape: list[int]) -> np.ndarray:
    if len(column) != shape[0] or len(column) * column.type.byte_width != 2 * math.prod(shape):
        raise ValueError(f"{len(column)} rows of {column.type} are not {shape}")
    return np.frombuffer(column.buffers()[1], "<i2", math.prod(shape)).reshape(shape)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _sample(arrays: list[np.ndarray]) -> int:
    """Checksum of pages spread evenly, the first and the last among them."""
    checksum = 0
    for data in map(_bytes, arrays):
        for i in range(PAGES):
            start = (len(data) - PAGE) * i // (PAGES - 1) if len(data) > PAGE else 0
            checksum = zlib.crc32(data[start : start + PAGE].tobytes(), checksum)
    return checksum


def _whole(arrays: list[np.ndarray]) -> str:
    """Hash of the sums of all blocks, each as little-endian numbers of 64 bits: at the speed of
    memory."""
    found = hashlib.sha256()
    for data in map(_bytes, arrays):
        even = len(data) // BLOCK * BLOCK
        sums = data[:even].view("<u8").reshape(-1, BLOCK // 8).sum(axis=1, dtype=np.uint64)
        found.update(sums.tobytes())
        found.update(data[even:].tobytes())
    return found.hexdigest()
