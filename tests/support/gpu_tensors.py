"""Synthetic inputs of calls on a GPU, from a generator on the CPU."""

import torch
from torch import Tensor


class Maker:
    """Tensors of order 1, in the order in which they are asked for."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def image(
        self,
        *sizes: int,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        drawn = torch.randn(sizes, generator=self.generator)
        return drawn.to(dtype).contiguous(memory_format=layout)

    def vector(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator) + 0.5

    def integers(self, dtype: torch.dtype, *sizes: int) -> Tensor:
        limits = torch.iinfo(dtype)
        drawn = torch.randint(
            limits.min, limits.max + 1, sizes, dtype=dtype, generator=self.generator
        )
        return drawn.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else drawn
