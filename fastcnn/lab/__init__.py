"""Instruments: what a network costs in time and memory, and the plain network to compare with."""

from fastcnn.lab.eager import eager_baseline
from fastcnn.plan.measure import interleaved, ratio, saved_for_backward
from fastcnn.plan.problem import bfloat16_instructions, describe

__all__ = [
    "bfloat16_instructions",
    "describe",
    "eager_baseline",
    "interleaved",
    "ratio",
    "saved_for_backward",
]
