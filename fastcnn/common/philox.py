"""Philox4x32-10 in PyTorch, as csrc/common/philox.h defines it for the kernels.

No state: a sample's numbers depend on a seed and its key alone, and are the same in any batch,
order, process and number of threads.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF  # the bits of a word


def philox4x32_10(counter: Tensor, seed: int | Tensor) -> Tensor:
    """Return the four random words [4, ...] of each counter [4, ...], int64 below 2^32.

    The 64 bits of the seed (a number, or an int64 tensor without dimensions) are the key.
    """
    device = counter.device
    if isinstance(seed, Tensor):
        first = torch.stack([seed & LOW, seed >> 32 & LOW]).to(device)
    else:
        first = torch.tensor([seed & LOW, seed >> 32 & LOW], device=device)
    constants = [[0x9E3779B9, 0xBB67AE85], [0xD2511F53, 0xCD9E8D57]]
    step, factors = torch.tensor(constants, device=device)
    ones = [1] * (counter.dim() - 1)
    keys = (first + step * torch.arange(10, device=device)[:, None]).view(10, 2, *ones)
    factors = factors.view(2, *ones)
    # Both halves of a round at once: even holds words 0 and 2, odd words 1 and 3. Products wrap
    # around 64 bits, which leaves both halves right; what stands above 32 bits in odd and in keys
    # ends where even is masked.
    even, odd = counter[0::2], counter[1::2]
    for key_of_round in keys.unbind():
        product = (even * factors).flip(0)
        even = (product >> 32 ^ odd ^ key_of_round) & LOW
        odd = product
    return torch.stack([even, odd & LOW], 1).flatten(0, 1)


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
