"""Random numbers that depend on a seed and a sample's key alone: Philox4x32-10 by counters.

No state: a sample's numbers are the same in any batch, order, process and number of threads.
"""

import torch
from torch import Tensor

from fastcnn.philox import LOW, philox4x32_10


def words(seed: int, keys: Tensor, count: int) -> Tensor:
    """Return int64 [n, count] of values below 2^32 for n keys (int64), each with its own stream.

    The seed is Philox's key; a counter holds the sample's key and the number of the block.
    """
    blocks, n = -(-count // 4), keys.shape[0]
    counter = torch.zeros(4, n, blocks, dtype=torch.int64)
    counter[0], counter[1] = (keys & LOW)[:, None], (keys >> 32 & LOW)[:, None]
    counter[2] = torch.arange(blocks)
    return philox4x32_10(counter, seed).movedim(0, 2).reshape(n, 4 * blocks)[:, :count]
