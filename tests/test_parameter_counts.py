"""The parameter counts of every system of the five logs, each to the last digit.

Counts that no log and no original code gave are from closed forms: a function below for the pitch
U-Nets, the arithmetic beside its row for the rest.
"""

import inspect

import pytest
import torch

from bgray.models import MODELS

# run | channels | blocks | factors | scale | bottleneck | patching | kernels | rest | count
WAV_UNETS = """
001 out23 | 1 8 64 256 512 | 2 2 3 4 | 8 8 4 2 | 1 1 1 1 | 0 | 1 | 7 | v1 layer | 21479313
001 out24 | 1 8 64 256 512 | 2 2 3 4 | 8 8 4 2 | 1 1 1 1 | 0 | 1 | 41 | v1 layer | 21680593
001 out25 | 1 8 64 256 512 | 4 4 4 4 | 8 8 4 2 | 1 1 1 1 | 0 | 1 | 41 | v1 layer | 22902289
001 out29|1 8 32 128 256 512|4 4 4 4 4|8 4 4 2 2|1 1 1 1 1|0|1|41|v1 layer|23846097
001 out30 | 1 8 64 128 256 | 4 4 4 4 | 8 8 2 2 | 1 1 1 1 | 0 | 1 | 41 | v1 layer | 6036497
002 out0 | 8 32 128 256 512 | 1 3 4 4 | 8 8 4 2 | 2 2 2 1 | 4 | 1 | 41 | layer | 15828073
002 out3 | 8 32 128 256 512 | 2 4 6 6 | 8 8 4 2 | 2 2 2 1 | 6 | 1 | 41 | layer | 22793225
002 out4|8 32 64 128 256 512 1024|1 3 4 4 4 4|8 4 2 2 2 2|2 2 1 1 1 1|4|1|41|layer|62800169
002 DAC | 32 64 128 256 512 | 3 3 3 3 | 2 4 8 8 | 1 2 4 4 | 3 | 1 | 41 | layer | 16256865
002 out5 | 32 64 128 256 512 | 1 3 3 3 | 2 4 8 8 | 1 2 4 4 | 3 | 1 | 41 | layer | 16217697
002 out6 | 16 32 128 256 512 | 1 3 3 3 | 2 4 8 8 | 1 1 4 4 | 3 | 1 | 41 | layer | 15960945
002 out7 | 8 16 64 256 512 | 1 3 3 3 | 2 4 8 8 | 1 1 2 4 | 3 | 1 | 41 | layer | 14703033
002 out8|8 16 32 64 128 256 512|1 3 3 3 3 3|4 2 4 2 4 2|2 1 2 1 2 1|3|1|41|layer|12563225
002 out9|8 16 32 64 128 256 512|1 3 3 3 3 3|2 4 2 4 2 4|1 2 1 2 1 2|3|1|41|layer|13401881
002 out10 | 16 32 64 128 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 2 | 3 | 4 | 41 | layer | 9778836
002 out11 | 16 32 64 128 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 2 | 3 | 2 | 41 | layer | 9778514
002 out11b | 16 32 128 256 512 | 3 3 3 3 | 2 4 4 8 | 1 1 2 4 | 3 | 2 | 41 | layer | 15448210
002 out11c | 16 32 128 256 512 | 3 3 3 3 | 2 4 4 8 | 1 1 2 4 | 3 | 2 | 7 23 41 | none | 15342802
002 out12 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | layer | 15668004
002 out13 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | none | 15659172
002 out14|32 64 128 256 512|3 3 3 3|2 2 4 8|1 1 2 4|3|4|41|none weight_norm|15687144
002 out15 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | none snake | 15676836
002 out15b|32 64 128 256 512|3 3 3 3|2 2 4 8|1 1 2 4|3|4|41|layer snake|15685668
002 out16 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 7 | none | 15509028
002 out17 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 23 | none | 15579684
002 out18 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 97 | none | 15906468
002 out19 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 7 23 41 | none | 15557028
002 out20|32 64 128 256 512|4 4 4 4|2 2 4 8|1 1 2 4|4|4|7 23 41 97|none|19153828
002 out21 | 48 96 192 384 768 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 7 23 41 | none | 34918516
"""
# run | channels | blocks | factors | scale | bottleneck | n_fft | hop | layout | count
SPEC_UNETS = """
001 2d small | 2 32 128 256 | 2 2 2 | 4 2 2 | 1 1 2 | 0 | 2046 | 512 | v1 | 3678594
001 out16 | 2 32 128 256 512 | 2 2 3 4 | 4 2 2 2 | 1 1 2 2 | 0 | 2046 | 512 | v1 | 25049218
002 out1 | 4 16 128 256 512 | 1 3 4 4 | 4 4 2 2 | 4 2 2 2 | 4 | 1022 | 256 | v2 | 18397246
"""
# What the logs print, where they do.
CLAIMS = {
    "001 out30": "6.0",
    "002 out0": "15.83",
    "002 out3": "22.79",
    "002 out4": "62.80",
    "002 DAC": "16.26",
    "002 out5": "16.22",
    "002 out6": "15.96",
    "002 out7": "14.70",
    "002 out8": "12.56",
    "002 out9": "13.40",
    "002 out10": "9.78",
    "002 out12": "15.67",
    "002 out15": "15.68",
    "002 out20": "19.15",
    "002 out21": "34.92",
    "000 wavenet final": "5.76",
}
LISTS = ("channels", "blocks", "factors", "scale_vs_channels")


def numbers(cell):
    return tuple(map(int, cell.split()))


def cells(table):
    return [[cell.strip() for cell in row.split("|")] for row in table.strip().split("\n")]


def wav_unets():
    for name, *lists, bottom, patching, kernels, rest, count in cells(WAV_UNETS):
        options = dict(zip(LISTS, map(numbers, lists), strict=True)) | {
            "bottleneck_blocks": int(bottom),
            "patching": int(patching),
            "kernels": numbers(kernels),
            "norm": "layer" if "layer" in rest else "none",
            "weight_norm": "weight_norm" in rest,
            "activation": "snake" if "snake" in rest else "gelu",
            "layout": "v1" if "v1" in rest else "v2",
        }
        yield name, "wav_unet", options, {}, int(count)


def spec_unets():
    for name, *lists, bottom, n_fft, hop, layout, count in cells(SPEC_UNETS):
        options = dict(zip(LISTS, map(numbers, lists), strict=True)) | {
            "bottleneck_blocks": int(bottom),
            "n_fft": int(n_fft),
            "hop": int(hop),
            "layout": layout,
        }
        yield name, "spec_unet", options, {}, int(count)


def wav_unet_parameters(o):
    """Parameters from the list of layers alone, independent of the module's code."""
    snake, norm, wn = o["activation"] == "snake", o["norm"] == "layer", o["weight_norm"]

    def block(c, k):
        depthwise = c * k + c + wn * c  # weight_norm adds one gain per output channel
        widen, narrow = 4 * c * c + 4 * c + wn * 4 * c, 4 * c * c + c + wn * c
        return depthwise + 2 * c * norm + widen + 4 * c * snake + narrow + c

    def conv(a, b, k):
        return a * b * k + b + wn * b

    channels, k = o["channels"], o["kernels"]
    v1 = o["layout"] == "v1"
    total = 0
    for i, (f, count) in enumerate(zip(o["factors"], o["blocks"], strict=True)):
        a, b = channels[i], channels[i + 1]
        strided = {1: 1, 2: 4, 4: 8, 8: 16}[f]
        total += conv(a, b, strided) + (b * a * strided + a)
        total += 2 * sum(block(b if v1 else a, k[j % len(k)]) for j in range(count))
        total += 0 if v1 else conv(2 * a, a, 1)
    total += o["bottleneck_blocks"] * block(channels[-1], o["bottleneck_kernel"] or k[0])
    p = o["patching"]
    return total + (0 if v1 else conv(p, channels[0], 5) + conv(channels[0], p, 5))


def spec_unet_parameters(o):
    """The same in two dimensions: strided kernels of f + 1, transposed ones of 2f, v2's edges 3."""

    def block(c):
        return c * o["kernel"] ** 2 + c + 2 * c + (4 * c * c + 4 * c) + (4 * c * c + c) + c

    channels, v1 = o["channels"], o["layout"] == "v1"
    total = 0
    for i, (f, count) in enumerate(zip(o["factors"], o["blocks"], strict=True)):
        a, b = channels[i], channels[i + 1]
        down, up = {1: (1, 1), 2: (3, 4), 4: (5, 8)}[f]
        total += (a * b * down**2 + b) + (b * a * up**2 + a)
        total += 2 * count * block(b if v1 else a)
        total += 0 if v1 else 2 * a * a + a
    total += o["bottleneck_blocks"] * block(channels[-1])
    edges = (2 * channels[0] * 9 + channels[0]) + (channels[0] * 2 * 9 + 2)
    return total + (0 if v1 else edges)


LEGACY = {"head": "legacy"}
LSTM = {"cell": "lstm", **LEGACY}
# An LSTM layer from i to h has 4h(i + h + 2) parameters.
ROLLS = [
    ("003 01", "roll_autoencoder", LEGACY, {}, 7_068_879),
    # Without the last batch norm's two.
    ("003 01 linear", "roll_autoencoder", {"head": "linear"}, {}, 7_068_877),
    (
        "003 02",
        "roll_rnn",
        {"cell": "rnn", "encoder": (64,), "layers": 5, "bridge": "none", **LEGACY},
        {},
        119_344,
    ),
    ("003 03", "roll_rnn", {**LSTM, "encoder": (128,), "layers": 5, "bridge": "none"}, {}, 967_360),
    # Encoder 512 * 218 + 4 * 512 * 258 = 640,000, decoder 352 * 218 + 4 * 352 * 178 = 327,360, and
    # one bridge: 2.
    (
        "003 04.3",
        "roll_rnn",
        {**LSTM, "encoder": (128,), "layers": 5, "bridge": "batch_norm"},
        {},
        967_362,
    ),
    # 88 -> 128: 512 * 218 + 2 * 512 * 258 = 375,808. 128 -> 256: 1024 * 386 + 2 * 1024 * 514
    # = 1,447,936. 256 -> 128: 512 * 386 + 2 * 512 * 258 = 461,824. 128 -> 88: 352 * 218
    # + 2 * 352 * 178 = 202,048. Three bridges: 6.
    (
        "003 05",
        "roll_rnn",
        {**LSTM, "encoder": (128, 256), "layers": 3, "bridge": "batch_norm"},
        {},
        2_487_622,
    ),
]

MR_1 = {"order": "act_bn", "out_bn": False, "output_mean_init": 0.0}
MR_2 = {**MR_1, "rnn": "gru"}
STEREO = {"sample_rate": 44100, "num_sources": 1, "channels_in": 2}  # counts are per target
# B bins, M of them seen, H = 512 features, g = 4 (LSTM) or 3 (GRU) gates:
#   input statistics and first layer 2M + 2MH, RNN 3gH(3H/2 + 2), second layer 2H^2, last layer and
#   output statistics 2BH + 2B, norms 4H and (mr-0) 4B.
# LSTM with output norm: 1026 M + 1030 B + 5,257,216.
UNMIXES = [
    ("004 mr-0", {}, 8_893_348),
    ("004 without max_bin", {"bandwidth_hz": None}, 9_469_960),
    ("004 mr-1", MR_1, 8_885_152),
    # One gate less than mr-1: 8,885,152 - 3 * 512 * 770.
    ("004 mr-2", MR_2, 7_702_432),
    # mr-2 that sees 2049 - 1487 bins more: + 562 * 1026 = 576,612.
    ("004 mr-2 without max_bin", {**MR_2, "bandwidth_hz": None}, 8_279_044),
    # And two further grids, each with two convolutions of 2 * 2 * 5 + 2, a 1x1 convolution from six
    # channels to two, 14, and its norm, 4: + 106. The geometry is ours, the log has none.
    (
        "004 mr-5",
        {**MR_2, "bandwidth_hz": None, "extra_resolutions": (4,)},
        8_279_150,
    ),
    # Two more grids by 2, kernels of 3: 4 * (2 * 2 * 3 + 2) = 56, and four channels more to join,
    # 8; to mr-2 with the grids by 4.
    ("004 mr-4", {**MR_2, "extra_resolutions": (2, 4)}, 7_702_432 + 106 + 56 + 8),
    ("004 n_fft 5632", {"n_fft": 5632}, 10_255_870),
    ("004 n_fft 6912", {"n_fft": 6912}, 11_391_134),
    ("004 n_fft 8192", {"n_fft": 8192}, 12_527_424),
    ("004 n_fft 8320", {"n_fft": 8320}, 12_640_540),
    # 16 kHz is just past the 4227th of 5825 bins: 1026 * 4227 + 1030 * 5825 + 5,257,216.
    ("004 n_fft 11648", {"n_fft": 11648}, 15_593_868),
    # 16 kHz is past the 5527th of 7617 bins: 1026 * 5527 + 1030 * 7617 + 5,257,216.
    ("004 n_fft 15232", {"n_fft": 15232}, 18_773_428),
    ("004 umxl", {"hidden": 1024}, 28_257_188),
]

FOUR = {"kernels": (551, 141, 37, 11)}
ONE_STACK = {"channels": 16, "stacks": 1, "layers": 10}
PROTOTYPE = {**ONE_STACK, "tail_channels": (16, 16), "tail_kernels": (3, 3, 1)}
FINAL = {"channels": 128, "stacks": 4, "layers": 10, "tail_channels": (512, 256)}
SEPARATORS = [
    ("000 2205", "conv_separator", {"kernels": (2205, 1), "inner_channels": 10}, 1, 22_071),
    ("000 gru", "gru_separator", {"kernel": 551, "channels": 10, "hidden": 3}, 1, 5_659),
    ("000 wave-u-net", "wave_unet", {}, 1, 622_702),
    ("000 4_convs", "conv_separator", {**FOUR, "inner_channels": 15}, 4, 49_024),
    ("000 4_convs n=2", "conv_separator", {**FOUR, "inner_channels": 15}, 2, 48_692),
    (
        "000 4_convs residual",
        "conv_separator",
        {**FOUR, "inner_channels": 15, "residual": True},
        4,
        49_024,
    ),
    # (141 + 37) * 25^2 + 25 * (551 + 3 + 11 * 4) + 4
    ("000 4_convs ic=25", "conv_separator", {**FOUR, "inner_channels": 25}, 4, 126_204),
    ("000 4_convs ic=50", "conv_separator", {**FOUR, "inner_channels": 50}, 4, 474_904),
    ("000 prototype as run", "wavenet", {**PROTOTYPE, "shared_convolutions": True}, 4, 11_476),
    ("000 prototype as meant", "wavenet", PROTOTYPE, 4, 21_316),
    # First block 2 * (3 * 128 + 128) + 2 * (128^2 + 128) = 34,048; 39 more of 2 * (3 * 128^2 + 128)
    # + 33,024 = 131,584; tail 3 * 128 * 512 + 512, 3 * 512 * 256 + 256, 4 * (256 + 1).
    ("000 wavenet final", "wavenet", {**FINAL, "tail_kernels": (3, 3, 1)}, 4, 5_757_444),
]

COUNTS = [
    *wav_unets(),
    *spec_unets(),
    *ROLLS,
    *((name, "open_unmix", options, STEREO, count) for name, options, count in UNMIXES),
    *((name, model, o, {"num_sources": n}, count) for name, model, o, n, count in SEPARATORS),
]


def build(model, options, given):
    with torch.device("meta"):
        return MODELS[model](**options, **given)


def parameters(model, options, given):
    return [p.numel() for p in build(model, options, given).parameters()]


def resolved(model, options):
    """The options with the defaults of those left out."""
    signature = inspect.signature(MODELS[model]).parameters
    empty = inspect.Parameter.empty
    return {k: p.default for k, p in signature.items() if p.default is not empty} | options


@pytest.mark.parametrize(
    ("name", "model", "options", "given", "count"), COUNTS, ids=[row[0] for row in COUNTS]
)
def test_a_system_has_exactly_this_many_parameters(name, model, options, given, count):
    assert sum(parameters(model, options, given)) == count
    if name in CLAIMS:
        digits = len(CLAIMS[name].partition(".")[2])
        assert f"{count / 1e6:.{digits}f}" == CLAIMS[name]


@pytest.mark.parametrize(
    "row", [r for r in COUNTS if r[1] in ("wav_unet", "spec_unet")], ids=lambda r: r[0]
)
def test_the_pitch_unets_have_the_parameters_of_the_closed_form(row):
    _, model, options, _, count = row
    closed_form = wav_unet_parameters if model == "wav_unet" else spec_unet_parameters
    assert closed_form(resolved(model, options)) == count


def test_every_row_has_a_name_of_its_own_and_options_that_pass_the_check():
    names = [row[0] for row in COUNTS]
    assert len(set(names)) == len(names)
    assert set(CLAIMS) <= set(names)
    for name, model, options, _, _ in COUNTS:
        assert MODELS[model].check(**resolved(model, options)) == [], name


def test_defaults_are_systems_of_the_logs():
    defaults = {
        "wav_unet": "002 out19",
        "spec_unet": "001 out16",
        "open_unmix": "004 mr-0",
        "conv_separator": "000 4_convs",
        "gru_separator": "000 gru",
        "wavenet": "000 wavenet final",
    }
    rows = {row[0]: row for row in COUNTS}
    for model, name in defaults.items():
        assert resolved(model, {}) == resolved(model, rows[name][2]), name


@pytest.mark.parametrize(
    ("options", "buffers"),
    # Mean, variance and a counter of each batch norm: over 512, 512 and 2 * 2049 features.
    [({}, 8_903_595 - 8_893_348), (MR_1, 8_887_202 - 8_885_152)],
)
def test_open_unmix_has_the_buffers_of_its_batch_norms_and_no_more(options, buffers):
    model = build("open_unmix", options, STEREO)
    assert sum(b.numel() for b in model.state_dict().values()) - buffers == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("name", "matrices", "vectors"),
    [("001 out24", (74, 21_626_144), (140, 54_449)), ("002 out0", (98, 15_778_336), (182, 49_737))],
)
def test_parameters_split_into_matrices_and_vectors_as_in_the_log(name, matrices, vectors):
    options = next(row[2] for row in COUNTS if row[0] == name)
    params = list(build("wav_unet", options, {}).parameters())
    deep = [p.numel() for p in params if p.ndim >= 2]
    flat = [p.numel() for p in params if p.ndim < 2]
    assert (len(deep), sum(deep)) == matrices
    assert (len(flat), sum(flat)) == vectors
