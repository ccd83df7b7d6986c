"""Instruments: what a network costs in time and memory, and the plain network to compare with."""

from fastcnn.lab.eager import eager_baseline
from fastcnn.plan.measure import interleaved, kept_for_backward, ratio

__all__ = ["eager_baseline", "interleaved", "kept_for_backward", "ratio"]
