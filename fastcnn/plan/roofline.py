"""How long a kernel takes at least, from its bytes and its flops and the card's numbers.

    seconds = max(bytes / bandwidth, flops / rate) + launch

It orders candidates where nothing was measured: kernels are taken to reach the same share of their
card, so that what counts is how often memory is walked, and how many launches that takes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fastcnn.plan.problem import Device

__all__ = ["CARDS", "Card", "Kernel", "card_of", "predicted_seconds"]


class Kernel(NamedTuple):
    """One kernel: bytes it must read and write, and flops of its arithmetic."""

    bytes: float
    flops: float = 0.0
    arithmetic: str = ""  # a name in Card.rates; "" is the problem's dtype


class Card(NamedTuple):
    """What a card can do: bytes a second, flops a second by arithmetic, seconds a launch."""

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
CARDS: dict[str, dict[str, Card]] = {
    "sm_80": {
        "A100": Card("A100", 2.039e12, _rates(624, 312, 312, 156, 19.5, 9.7), "datasheet, 80 GB"),
    },
    "sm_90": {
        "H100": Card("H100", 3.35e12, _rates(1979, 989, 989, 494, 67, 34), "datasheet, SXM"),
        "H200": Card(
            "H200", 4.3e12, _rates(1979, 790, 790, 494, 67, 34),
            "copy and bf16 product measured on one, fp16 taken as bf16; the others datasheet",
        ),
    },
    "sm_100": {
        "B200": Card("B200", 7.7e12, _rates(4500, 2250, 2250, 1100, 75, 37), "datasheet, HGX"),
    },
    "cpu": {
        "CPU": Card(
            "CPU", 0.041e12, _rates(1.6, 0.87, 0.001, 0.2, 0.2, 0.097),
            "copy and products measured on 2 cores of an AMD EPYC with AMX, torch 2.13 (no fast "
            "fp16 there; tf32 is float32); a launch is an operator's call",
            launch=6e-6,
        ),
    },
}  # fmt: skip


def card_of(device: Device) -> tuple[Card, str]:
    """Return the card whose numbers count for a device, and how the choice came about."""
    if not device.capability.startswith("sm_"):
        (card,) = CARDS["cpu"].values()
        return card, f"numbers of {card.name}"
    number = int(device.capability.removeprefix("sm_"))
    known = [name for name in CARDS if name != "cpu"]
    # An unknown capability: the newest known that is not newer, else the oldest.
    older = [name for name in known if int(name.removeprefix("sm_")) <= number]
    capability = older[-1] if older else known[0]
    cards = CARDS[capability]
    for word, card in cards.items():
        if re.search(rf"\b{word}\b", device.name):
            return card, f"numbers of {card.name}"
    card = next(iter(cards.values()))
    return card, f"numbers of {card.name}, there being none of {device.name} {device.capability}"


def predicted_seconds(card: Card, dtype: torch.dtype, kernels: Sequence[Kernel]) -> float:
    """Return the sum over `kernels`, which run one after another, of the formula above.

    Raises:
        ValueError: the card has no rate for an arithmetic that a kernel asks for.
    """
    seconds = 0.0
    for kernel in kernels:
        arithmetic = kernel.arithmetic or str(dtype).removeprefix("torch.")
        if kernel.flops and arithmetic not in card.rates:
            expected = ", ".join(card.rates)
            raise ValueError(f"arithmetic: expected one of {expected}, got {arithmetic}")
        computing = kernel.flops / card.rates[arithmetic] if kernel.flops else 0.0
        seconds += max(kernel.bytes / card.bandwidth, computing) + card.launch
    return seconds
