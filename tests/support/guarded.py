"""Tensors beside memory that must not be touched."""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_mprotect = ctypes.CDLL(None).mprotect


def guarded(values: Tensor, front: bool = False) -> Tensor:
    """Return a copy with the same strides that ends at the end of its pages; the next is forbidden.

    front: it begins where its pages do, behind a forbidden one.
    """
    elements = 0
    if values.numel() > 0:
        steps = zip(values.shape, values.stride(), strict=True)
        elements = 1 + sum((n - 1) * stride for n, stride in steps)
    if elements == 0:
        return values
    size = elements * values.element_size()
    pages = -(-size // PAGE) * PAGE
    area = mmap.mmap(-1, pages + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    forbidden = address if front else address + pages
    assert _mprotect(ctypes.c_void_p(forbidden), PAGE, 0) == 0
    offset = PAGE if front else pages - size
    flat = torch.frombuffer(area, dtype=values.dtype, count=elements, offset=offset)
    flat.copy_(torch.as_strided(values, (elements,), (1,)))
    return flat.as_strided(values.shape, values.stride())
