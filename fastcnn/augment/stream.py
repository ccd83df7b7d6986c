"""Random numbers that depend on a seed and a sample's key alone: Philox4x32-10 by counters.

No state: a sample's numbers are the same in any batch, order, process and number of threads.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def words(seed: int, keys: Tensor, count: int) -> Tensor:
    """Return int64 [n, count] of values below 2^32 for n keys (int64), each with its own stream.

    The seed is Philox's key; a counter holds the sample's key and the number of the block.
    """
    blocks, n = -(-count // 4), keys.shape[0]
    # Both halves of a round at once: even holds words 0 and 2 of the counters, odd words 1 and 3.
    even, odd = torch.zeros(2, 2, n, blocks, dtype=torch.int64)
    even[0], odd[0] = (keys & _LOW)[:, None], (keys >> 32 & _LOW)[:, None]
    even[1] = torch.arange(blocks)
    factors = torch.tensor([0xD2511F53, 0xCD9E8D57])[:, None, None]
    key = torch.tensor([seed & _LOW, seed >> 32 & _LOW])[:, None, None]
    step = torch.tensor([0x9E3779B9, 0xBB67AE85])[:, None, None]
    for round_key in [(key + i * step) & _LOW for i in range(10)]:
        product = even * factors  # wraps around 64 bits, which leaves both halves right
        even = (product >> 32 & _LOW).flip(0) ^ odd ^ round_key
        odd = (product & _LOW).flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]], 2).reshape(n, 4 * blocks)[:, :count]
