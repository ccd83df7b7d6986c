"""Random numbers that depend on a seed and a sample's key alone: Philox4x32-10 by counters.

No state: a sample's numbers are the same in any batch, order, process and number of threads.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def words(seed: int, keys: Tensor, count: int) -> Tensor:
    """Return int64 [n, count] of values below 2^32 for n keys (int64), each with a stream of its own.

    The seed is Philox's key; a counter holds the sample's key and the number of the block.
    """
    blocks = -(-count // 4)
    n = keys.shape[0]
    block = torch.arange(blocks).expand(n, blocks)
    a, b = keys[:, None] & _LOW, (keys[:, None] >> 32) & _LOW
    counter = [a.expand(n, blocks), b.expand(n, blocks), block, torch.zeros_like(block)]
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products wrap around 64 bits, which leaves both halves right.
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((p1 >> 32) & _LOW) ^ counter[1] ^ k0, p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ counter[3] ^ k1, p0 & _LOW,
        ]  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack(counter, 2).reshape(n, 4 * blocks)[:, :count]


def uniforms(seed: int, keys: Tensor, count: int) -> Tensor:
    """Return float64 [n, count] in [0, 1) for n keys."""
    return words(seed, keys, count) * 2.0**-32
