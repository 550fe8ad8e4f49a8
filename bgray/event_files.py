"""TensorBoard's file format: records of numbers, text, sound, pictures and hyper-parameters."""

import importlib
import json
import struct
from typing import Any

import numpy as np

# Here and not where it is needed: its modules import each other in circles, on which two threads
# that need it at the same time would run into a deadlock.
from tensorboardX import crc32c


def _proto(name: str) -> Any:
    """One of tensorboardX's generated modules, of which type checkers know nothing."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")


def file_of(events: list[Any]) -> bytes:
    """A file of records, each: length, its checksum, data, its checksum."""
    first = events[0].wall_time if events else 0.0
    version = _proto("event").Event(wall_time=first, file_version="brain.Event:2")
    parts = []
    for record in [version, *events]:
        data = record.SerializeToString()
        length = struct.pack("<Q", len(data))
        parts += [length, _masked(length), data, _masked(data)]
    return b"".join(parts)


def _masked(data: bytes) -> bytes:
    """As the format has checksums, so that one of data with checksums in it is still one."""
    value = checksum(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


LANES = 1024
SHORT = 16 * LANES  # bytes, up to which one after the other is as fast


def checksum(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4). tensorboardX's own goes byte by byte, 0.1 s a MB; here many
    pieces of what is long go side by side, and are put together as CRCs are linear."""
    if len(data) <= SHORT:
        return crc32c.crc32c(data)
    padded = np.zeros(-(-len(data) // LANES) * LANES, np.uint8)
    # Zeros in front change nothing, once the start value is in the data.
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 0xFF
    state = np.zeros(LANES, np.uint32)
    # What as many zero bytes as a piece has make of each bit of a state.
    after = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for column in padded.reshape(LANES, -1).T:
        state = TABLE[(state ^ column) & 0xFF] ^ (state >> 8)
        after = TABLE[after & 0xFF] ^ (after >> 8)
    while len(state) > 1:
        state = _through(after, state[::2]) ^ state[1::2]
        after = _through(after, after)
    return int(state[0]) ^ 0xFFFFFFFF


def _through(images: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map, given by the images of the 32 bits, of each state."""
    found = np.zeros_like(states)
    for bit, image in enumerate(images):
        found ^= np.where(states >> np.uint32(bit) & 1, image, np.uint32(0))
    return found


TABLE = np.array(crc32c.CRC_TABLE, np.uint32)


def event(wall: float, step: int, values: list[Any]) -> Any:
    """wall: seconds since 1970."""
    summary = _proto("summary").Summary(value=values)
    return _proto("event").Event(wall_time=wall, step=step, summary=summary)


# --- values


def scalar(tag: str, value: float) -> Any:
    return _proto("summary").Summary.Value(tag=tag, simple_value=value)


def text(tag: str, words: str) -> Any:
    """Words that are read as Markdown."""
    return _strings(tag, [words.encode()], (1,), _metadata("text", b""))


def sound(tag: str, wav: bytes) -> Any:
    """A WAV file as it is."""
    # Summary.Audio has a place for the type, but the usual server forgets it, and browsers then do
    # not know what they are given. b"..." is AudioPluginData(encoding=WAV); b"" an empty label.
    return _strings(tag, [wav, b""], (1, 2), _metadata("audio", b"\x10\x0b"))


def picture(tag: str, png: bytes) -> Any:
    """A PNG file as it is."""
    summary = _proto("summary").Summary
    width, height = struct.unpack(">II", png[16:24])
    image = summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return summary.Value(tag=tag, image=image)


# --- the table of hyper-parameters


def kind_of(value: Any) -> str:
    """number, bool or text: what the table can tell apart."""
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else "text"


def columns(hparams: dict[str, str], metrics: list[str]) -> Any:
    """What the table has: {name: kind}, and tags of scalars beside them."""
    api = _proto("api")
    types = {"number": "DATA_TYPE_FLOAT64", "bool": "DATA_TYPE_BOOL", "text": "DATA_TYPE_STRING"}
    experiment = api.Experiment(
        hparam_infos=[api.HParamInfo(name=name, type=types[k]) for name, k in hparams.items()],
        metric_infos=[api.MetricInfo(name=api.MetricName(tag=tag)) for tag in metrics],
    )
    return _hparams("experiment", experiment=experiment)


def session_start(values: dict[str, Any], now: float) -> Any:
    """A row of the table. Lists become their JSON."""
    info = _proto("plugin_hparams").SessionStartInfo(start_time_secs=now)
    for name, value in values.items():
        if (kind := kind_of(value)) == "bool":
            info.hparams[name].bool_value = value
        elif kind == "number":
            info.hparams[name].number_value = value
        else:
            words = value if isinstance(value, str) else json.dumps(value)
            info.hparams[name].string_value = words
    return _hparams("session_start_info", session_start_info=info)


def session_end(good: bool, now: float) -> Any:
    """How that row ended."""
    status = "STATUS_SUCCESS" if good else "STATUS_FAILURE"
    info = _proto("plugin_hparams").SessionEndInfo(status=status, end_time_secs=now)
    return _hparams("session_end_info", session_end_info=info)


def _hparams(tag: str, **data: Any) -> Any:
    content = _proto("plugin_hparams").HParamsPluginData(version=0, **data).SerializeToString()
    metadata = _metadata("hparams", content)
    return _proto("summary").Summary.Value(tag=f"_hparams_/{tag}", metadata=metadata)


def _metadata(plugin: str, content: bytes) -> Any:
    made = _proto("summary").SummaryMetadata
    return made(plugin_data=made.PluginData(plugin_name=plugin, content=content))


def _strings(tag: str, values: list[bytes], shape: tuple[int, ...], metadata: Any) -> Any:
    tensor = _proto("tensor").TensorProto(dtype="DT_STRING", string_val=values)
    for size in shape:
        tensor.tensor_shape.dim.add().size = size
    return _proto("summary").Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
