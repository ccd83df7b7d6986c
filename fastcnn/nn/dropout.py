"""Dropout and Dropout2d."""

import torch
from torch import Tensor

from fastcnn.functional import dropout


class Dropout(torch.nn.Dropout):
    """Dropout of elements and an optional residual as one fused operation.

    ``forward(x, residual=None) = dropout(x) + residual``, and ``x + residual`` in evaluation.
    Arguments are torch.nn.Dropout's, which it is an instance of. Shapes, dtypes and errors are
    those of :func:`fastcnn.functional.dropout`.

    Args:
        p: probability that an element is zeroed.
        inplace: whether to write the result into the input's memory.

    Example:
        >>> x = torch.ones(2, 8, 4, 4)
        >>> fastcnn.nn.Dropout(0.2).eval()(x, residual=x).unique()
        tensor([2.])
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return dropout(input) + residual."""
        return dropout(input, self.p, self.training, self.inplace, residual=residual)


class Dropout2d(torch.nn.Dropout2d):
    """Dropout of whole channels and an optional residual as one fused operation.

    ``forward(x, residual=None) = dropout(x) + residual``, with one draw for each [n, c], and
    ``x + residual`` in evaluation. Arguments are torch.nn.Dropout2d's, which it is an instance of.
    Shapes, dtypes and errors are those of :func:`fastcnn.functional.dropout`.

    Args:
        p: probability that a channel is zeroed.
        inplace: whether to write the result into the input's memory.

    Example:
        >>> y = fastcnn.nn.Dropout2d(0.5)(torch.ones(8, 8, 4, 4))
        >>> y.amax((2, 3)).equal(y.amin((2, 3)))  # whole channels
        True
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return dropout(input) + residual."""
        return dropout(
            input, self.p, self.training, self.inplace, residual=residual, per_channel=True
        )
