"""Peaks of devices."""

import pytest
import torch

from bgray.devices import DEVICES, Peak, known, measured_cpu


def test_gpus_are_found_by_the_names_that_torch_gives_them():
    assert known("NVIDIA H100 80GB HBM3").name == "H100 SXM"
    assert known("NVIDIA H100 PCIe").gb_per_second == 2039
    assert known("NVIDIA H200").gb_per_second == 4800
    assert known("NVIDIA A100-SXM4-40GB").tflops["bf16"] == 312
    assert known("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert known("Tesla T4").name == "T4"


def test_a_slice_of_a_gpu_and_an_unknown_one_have_no_peak():
    assert known("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert known("NVIDIA H100 NVL") is None


def test_every_gpu_has_a_source_and_no_matrix_unit_is_slower_than_the_vector_units():
    for peak in DEVICES.values():
        assert peak.source
        assert peak.tflops["fp32"] <= peak.tflops["tf32"] <= peak.tflops["bf16"]


def test_least_times_are_sums_of_operations_and_bytes_over_the_peaks():
    peak = Peak("toy", {"fp32": 1.0, "bf16": 4.0}, 10.0, "made up")
    assert peak.compute_seconds({"fp32": 2e12, "bf16": 8e12}) == pytest.approx(4.0)
    assert peak.move_seconds(5e9) == pytest.approx(0.5)


def test_a_cpus_peaks_are_measured_and_its_threads_left_as_they_were():
    before = torch.get_num_threads()
    peak = measured_cpu(1, seconds=0.02)
    assert torch.get_num_threads() == before
    assert 1e-4 < peak.tflops["fp32"] < 100
    assert 0.05 < peak.gb_per_second < 10_000
