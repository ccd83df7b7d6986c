"""Random numbers that depend on a seed and a sample's key alone: Philox4x32-10 by counters.

No state: a sample's numbers are the same in any batch, order, process and number of threads.
"""

import torch
from torch import Tensor

from fastcnn.philox import LOW, philox4x32_10


def words(seed: int | Tensor, keys: Tensor, count: int) -> Tensor:
    """Return int64 [n, count] of values below 2^32 for n keys (int64), each with its own stream.

    The seed is Philox's key; a counter holds the sample's key and the number of the block.
    """
    blocks, n = -(-count // 4), keys.shape[0]
    low, high = (keys & LOW).expand(blocks, n), (keys >> 32 & LOW).expand(blocks, n)
    number = torch.arange(blocks, device=keys.device)[:, None].expand(blocks, n)
    counter = torch.stack([low, high, number, torch.zeros_like(number)])
    # Word by word, so that each is contiguous over the samples.
    return philox4x32_10(counter, seed).transpose(0, 1).reshape(4 * blocks, n)[:count].t()
