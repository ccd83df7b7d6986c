"""The dispatcher library `fastcnn`: schemas are declared here, kernels come from _ops.so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcnn import _C

# Kernels read memory in the order that the strides of tracing time promised.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def declare(schema: str, fake: Callable[..., Any]) -> None:
    """Declare an operator: its schema, and what it returns for tensors without data."""
    name = f"fastcnn::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :], tags=_TAGS)
    torch.library.register_fake(name, fake)


def load_kernels() -> None:
    """Load the kernels of this build into the declared operators."""
    library = Path(_C.__file__).with_name("_ops.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"fastcnn {_C.version} cannot load its kernels {library} into torch "
            f"{torch.__version__}: {error}; rebuild it against this torch with "
            f"`pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error
