"""Philox4x32-10 in PyTorch, as csrc/common/philox.h defines it for the kernels.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF  # the bits of a word


def philox4x32_10(counter: Tensor, seed: int) -> Tensor:
    """Return the four random words [4, ...] of each counter [4, ...], int64 below 2^32.

    The seed's 64 bits are the key.
    """
    ones = [1] * (counter.dim() - 1)
    key, step, factors = torch.tensor(
        [[seed & LOW, seed >> 32 & LOW], [0x9E3779B9, 0xBB67AE85], [0xD2511F53, 0xCD9E8D57]]
    ).view(3, 2, *ones)
    # Both halves of a round at once: even holds words 0 and 2, odd words 1 and 3.
    even, odd = counter[0::2], counter[1::2]
    for i in range(10):
        product = even * factors  # wraps around 64 bits, which leaves both halves right
        even = (product >> 32 & LOW).flip(0) ^ odd ^ (key + i * step & LOW)
        odd = (product & LOW).flip(0)
    return torch.stack([even, odd], 1).flatten(0, 1)
