"""How long a kernel takes at least, from its bytes and its flops and the GPU's numbers.

    seconds = max(bytes / bandwidth, flops / rate) + launch

It says which candidates may be worth tuning: a bound, since no kernel's instructions are in it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fastcnn.plan.problem import Device

__all__ = ["PEAKS", "Kernel", "Peaks", "peaks_of", "predicted_seconds"]


class Kernel(NamedTuple):
    """One kernel: bytes it must read and write, and flops of its arithmetic."""

    bytes: float
    flops: float = 0.0
    arithmetic: str = ""  # a name in Peaks.rates; "" is the problem's dtype


class Peaks(NamedTuple):
    """The most a device can do: bytes/s, flops/s by arithmetic; and seconds a launch."""

    name: str
    bandwidth: float
    rates: Mapping[str, float]
    source: str
    # Predicted, not measured: docs/gpu-notes.md expects 10 to 15 us for three short kernels.
    launch: float = 4e-6


def _rates(
    int8: float, bfloat16: float, float16: float, tf32: float, float32: float, float64: float
) -> Mapping[str, float]:
    """Rates by arithmetic, from TFLOP/s (TOP/s) without sparsity."""
    tera = {"int8": int8, "uint8": int8, "bfloat16": bfloat16, "float16": float16}
    tera |= {"tf32": tf32, "float32": float32, "float64": float64}
    return {arithmetic: 1e12 * rate for arithmetic, rate in tera.items()}


# By capability, then by a word of the device's name; the first stands for all others.
PEAKS: dict[str, dict[str, Peaks]] = {
    "sm_80": {
        "A100": Peaks("A100", 2.039e12, _rates(624, 312, 312, 156, 19.5, 9.7), "datasheet, 80 GB"),
    },
    "sm_90": {
        "H100": Peaks("H100", 3.35e12, _rates(1979, 989, 989, 494, 67, 34), "datasheet, SXM"),
        "H200": Peaks(
            "H200",
            4.3e12,
            _rates(1979, 790, 790, 494, 67, 34),
            "copy and bf16 product measured on one, fp16 taken as bf16; the others datasheet",
        ),
    },
    "sm_100": {
        "B200": Peaks("B200", 7.7e12, _rates(4500, 2250, 2250, 1100, 75, 37), "datasheet, HGX"),
    },
    "cpu": {
        "CPU": Peaks(
            "CPU",
            0.041e12,
            _rates(1.6, 0.87, 0.001, 0.2, 0.2, 0.097),
            "copy and products measured on 2 cores of an AMD EPYC with AMX, torch 2.13 (no fast "
            "fp16 there; tf32 is float32); a launch is an operator's call",
            launch=6e-6,
        ),
    },
}


def peaks_of(device: Device) -> tuple[Peaks, str]:
    """Return the numbers that count for a device, and how the choice came about."""
    if not device.capability.startswith("sm_"):
        (peaks,) = PEAKS["cpu"].values()
        return peaks, f"numbers of {peaks.name}"
    number = int(device.capability.removeprefix("sm_"))
    known = [name for name in PEAKS if name != "cpu"]
    # An unknown capability: the newest known that is not newer, else the oldest.
    older = [name for name in known if int(name.removeprefix("sm_")) <= number]
    capability = older[-1] if older else known[0]
    peaks_by_name = PEAKS[capability]
    for word, peaks in peaks_by_name.items():
        if re.search(rf"\b{word}\b", device.name):
            return peaks, f"numbers of {peaks.name}"
    peaks = next(iter(peaks_by_name.values()))
    return peaks, f"numbers of {peaks.name}, there being none of {device.name} {device.capability}"


def predicted_seconds(peaks: Peaks, dtype: torch.dtype, kernels: Sequence[Kernel]) -> float:
    """Return the sum over `kernels`, which run one after another, of the formula above.

    Raises:
        ValueError: the GPU has no rate for an arithmetic that a kernel asks for.
    """
    seconds = 0.0
    for kernel in kernels:
        arithmetic = kernel.arithmetic or str(dtype).removeprefix("torch.")
        if kernel.flops and arithmetic not in peaks.rates:
            expected = ", ".join(peaks.rates)
            raise ValueError(f"arithmetic: expected one of {expected}, got {arithmetic}")
        computing = kernel.flops / peaks.rates[arithmetic] if kernel.flops else 0.0
        seconds += max(kernel.bytes / peaks.bandwidth, computing) + peaks.launch
    return seconds
