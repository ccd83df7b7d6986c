"""Fused kernels for training and running convolutional networks in PyTorch.

    fastcnn.convert(model)          let them run what of any model they can, in place
    fastcnn.revert(model)           the model as it was
    fastcnn.report(model)           what runs fused, by which backend, and why the rest does not
    fastcnn.verify(model, x)        a converted model compared with the unconverted one
    fastcnn.create_model(name)      networks with torchvision's names, of fastcnn.list_models()
    fastcnn.functional, fastcnn.nn  the ops as functions and as layers
    fastcnn.augment                 augmentation of uint8 batches in one pass
    fastcnn.models                  the networks, and load_weights
    fastcnn.plan                    which of several kernels runs, and why
    fastcnn.graphed(step, *example) on a GPU: replay a training step or a network as a CUDA graph
    fastcnn.keep_freed_memory()     on the CPU: reuse what tensors free

On the console: fastcnn demo, fastcnn info. Each name's help has its shapes, errors and an example.
"""

import torch

from fastcnn._version_check import check_compiled_part, check_torch

check_compiled_part()

from fastcnn import _C  # noqa: E402

check_torch(torch.__version__, _C.version)

from fastcnn import augment, functional, models, nn, plan  # noqa: E402
from fastcnn.common.library import load_kernels  # noqa: E402
from fastcnn.convert import convert, report, revert, verify  # noqa: E402
from fastcnn.graphs import graphed  # noqa: E402
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
    "graphed",
    "keep_freed_memory",
    "list_models",
    "models",
    "nn",
    "plan",
    "report",
    "revert",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
