"""Augment, as a layer beside the others."""

from fastcnn.augment import Augment

__all__ = ["Augment"]
