"""What devices can do at most: operations and bytes per second, from data sheets or measured."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Peak:
    """Operations count a multiplication and an addition as two; without sparsity."""

    name: str
    tflops: dict[str, float]
    """1e12 operations a second by precision: fp32 (vector units), tf32 and bf16 (matrix units)."""
    gb_per_second: float
    """1e9 bytes a second between memory and chip, both ways together."""
    source: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def compute_seconds(self, flops: Mapping[str, float]) -> float:
        """The least time for so many operations by precision, one after the other."""
        return sum(count / self.tflops[precision] for precision, count in flops.items()) / 1e12

    def move_seconds(self, num_bytes: float) -> float:
        return num_bytes / self.gb_per_second / 1e9


def _gpu(name: str, fp32: float, tf32: float, bf16: float, gb: float, source: str) -> Peak:
    return Peak(name, {"fp32": fp32, "tf32": tf32, "bf16": bf16}, gb, source)


HOPPER = "NVIDIA H100 Tensor Core GPU datasheet"
AMPERE = "NVIDIA A100 Tensor Core GPU datasheet"
DEVICES = {
    "H200": _gpu("H200 SXM", 66.9, 494.7, 989.4, 4800, "NVIDIA H200 Tensor Core GPU datasheet"),
    "H100 PCIe": _gpu("H100 PCIe", 51.2, 378.0, 756.0, 2039, HOPPER),
    "H100 80GB HBM3": _gpu("H100 SXM", 66.9, 494.7, 989.4, 3352, HOPPER),
    "A100-SXM4-40GB": _gpu("A100 SXM 40 GB", 19.5, 156.0, 312.0, 1555, AMPERE),
    "A100-PCIE-40GB": _gpu("A100 PCIe 40 GB", 19.5, 156.0, 312.0, 1555, AMPERE),
    "A100-SXM4-80GB": _gpu("A100 SXM 80 GB", 19.5, 156.0, 312.0, 2039, AMPERE),
    "A100 80GB PCIe": _gpu("A100 PCIe 80 GB", 19.5, 156.0, 312.0, 1935, AMPERE),
    "L4": _gpu("L4", 30.3, 60.5, 121.0, 300, "NVIDIA L4 Tensor Core GPU datasheet"),
    # It has no tf32 and no bf16: both run on its vector units.
    "T4": _gpu("T4", 8.1, 8.1, 8.1, 320, "NVIDIA T4 Tensor Core GPU datasheet"),
    "RTX 3090": _gpu("RTX 3090", 35.6, 35.6, 71.2, 936, "NVIDIA GA102 whitepaper"),
    "RTX 4090": _gpu("RTX 4090", 82.6, 82.6, 165.2, 1008, "NVIDIA Ada architecture whitepaper"),
}
"""By torch's name of the GPU without the maker's words; bf16 with sums in float32."""


def known(name: str) -> Peak | None:
    """By torch's name of a GPU; None where it is not in the table, or is a slice of one (MIG)."""
    for word in ("NVIDIA", "GeForce", "Tesla"):
        name = name.replace(word, "")
    return DEVICES.get(name.strip())


def peak_of(device: torch.device, threads: int = 1) -> Peak | None:
    """Of the table; a CPU's is measured, which takes about a second."""
    if device.type == "cuda":
        return known(torch.cuda.get_device_name(device))
    return measured_cpu(threads)


def measured_cpu(threads: int, seconds: float = 0.3) -> Peak:
    """The best of many products of square float32 and bf16 matrices, and of copies of 64 MiB (read
    and written), on so many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size, tflops = 768, {}
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            tflops[precision] = 2 * size**3 / _best(lambda a=a, b=b: a @ b, seconds) / 1e12
        tflops["tf32"] = tflops["fp32"]
        data = torch.zeros(16 * 2**20)
        copy = torch.empty_like(data)
        rate = 2 * 4 * data.numel() / _best(lambda: copy.copy_(data), seconds) / 1e9
    finally:
        torch.set_num_threads(before)
    source = f"measured: {size} x {size} matrix products and 64 MiB copies on {threads} threads"
    return Peak("this CPU", tflops, rate, source)


def _best(do: Any, seconds: float) -> float:
    do()
    least, deadline = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < deadline:
        do()
        least = min(least, time.perf_counter() - began)
    return least
