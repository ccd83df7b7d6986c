"""Fused kernels for training and running convolutional networks in PyTorch."""

import torch

from fastcnn._version_check import check_compiled_part, check_torch

check_compiled_part()

from fastcnn import _C  # noqa: E402

check_torch(torch.__version__, _C.version)

from fastcnn import augment, functional, models, nn, plan  # noqa: E402
from fastcnn.common.library import load_kernels  # noqa: E402
from fastcnn.convert import convert, report, revert, verify  # noqa: E402
from fastcnn.memory import keep_freed_memory  # noqa: E402
from fastcnn.models import create_model, list_models  # noqa: E402

load_kernels()

__version__: str = _C.version
__all__ = [
    "__version__",
    "augment",
    "convert",
    "create_model",
    "functional",
    "keep_freed_memory",
    "list_models",
    "models",
    "nn",
    "plan",
    "report",
    "revert",
    "verify",
]
