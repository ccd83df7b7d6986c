"""The same mathematics in plain PyTorch, differentiable by autograd and runnable in float64."""

from fastcnn.reference.batch_norm_act import batch_norm_act
from fastcnn.reference.upsample import upsample

__all__ = ["batch_norm_act", "upsample"]
