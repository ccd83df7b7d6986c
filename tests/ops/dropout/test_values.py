"""dropout against its reference, against torch.nn.functional.dropout's rules, and its statistics.

Masks are compared bit by bit. How exact a value must be, and why: support/tolerance.py.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.seeds import DROPOUT_SEED, seed_all, seeded
from support.shapes import EDGES, LAYOUTS, RESNET50, Image
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fastcnn import reference
from fastcnn.common.philox import philox4x32_10
from fastcnn.functional import dropout
from fastcnn.lab import saved_for_backward
from fastcnn.nn import Dropout, Dropout2d
from fastcnn.reference.dropout import draws, threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
raw = torch.ops.fastcnn.dropout_apply


def mask(
    sizes: tuple[int, ...],
    p: float,
    per_channel: bool = False,
    seed: int = DROPOUT_SEED,
    **layout: Any,
) -> Tensor:
    ones = torch.ones(sizes).contiguous(**layout)
    return raw(ones, None, torch.tensor(seed), p, per_channel) != 0


def test_philox_gives_the_published_answers() -> None:
    # kat_vectors of the Random123 library; the C++ definition is asked the same when it is
    # compiled (csrc/common/philox.h).
    vectors = """
        00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
        ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
        243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
    """
    for vector in vectors.strip().splitlines():
        numbers = [int(word, 16) for word in vector.split()]
        words = philox4x32_10(torch.tensor(numbers[:4]), numbers[4] | numbers[5] << 32)
        assert words.tolist() == numbers[6:]


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", EDGES + RESNET50[5:8], ids=str)
def test_masks_are_the_references(image: Image, layout: str) -> None:
    # p of 0.1: the threshold has lower bits, and in 65536 elements one needs its further draw. Of
    # 1 - 2^-17 the upper half is 0, so that nothing is kept without one.
    for p, per_channel in itertools.product((0.1, 0.5, 1 - 2**-17), (False, True)):
        expected = (
            reference.dropout(torch.ones(image.sizes), DROPOUT_SEED, p, None, per_channel) != 0
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.ones(image.sizes, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
            y = raw(x, None, torch.tensor(DROPOUT_SEED), p, per_channel)
            assert torch.equal(y != 0, expected), (p, per_channel, dtype)
            assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, layout: str) -> None:
    # The oracle is PyTorch's product with the reference's mask, in float64: the scale, the product
    # and the sum are rounded. Slices start at addresses that are no multiple of a vector.
    for sizes, added, per_channel, inplace in itertools.product(
        [(5, 7, 9, 11), (2, 64, 8, 8), (3, 200, 7, 7)], [False, True], [False, True], [False, True]
    ):
        g = seeded(1)
        base = torch.randn((3, sizes[0] + 1, *sizes[1:]), generator=g).to(dtype)
        images = [t.contiguous(memory_format=LAYOUTS[layout])[1:] for t in base.unbind()]
        x, residual, dy = (t.detach().requires_grad_() for t in images)
        seed_all(5)
        y = dropout(
            x * 1 if inplace else x,
            0.3,
            inplace=inplace,
            residual=residual if added else None,
            per_channel=per_channel,
        )
        y.backward(dy.detach())
        seed_all(5)
        keep = dropout(torch.ones_like(x), 0.3, per_channel=per_channel).detach() != 0
        results = {"y": y.detach(), "dx": x.grad}
        if added:
            assert torch.equal(residual.grad, dy.detach())
        for name, source in (("y", x), ("dx", dy)):
            product = source.detach().double() * keep * (2**32 / threshold(0.3))
            term = residual.detach().double() if added and name == "y" else torch.zeros(1)
            assert results[name].stride() == x.stride()
            error = walk(1, dtype) * (product.abs() + term.abs())
            assert_rounded(name, results[name], product + term, error)


def test_any_number_of_dimensions() -> None:
    # The mask is that of the flat tensor; per channel that of [n, c] whatever follows.
    flat = mask((120,), 0.4)
    for sizes in [(2, 3, 4, 5), (120, 1), (2, 60), (4, 5, 6), (1, 2, 3, 4, 5)]:
        assert torch.equal(mask(sizes, 0.4).flatten(), flat), sizes
    channels = mask((4, 30, 1), 0.4, True)
    for rest in [(7,), (2, 3), (2, 2, 2)]:
        expected = channels.reshape(4, 30, *(1 for _ in rest)).expand(4, 30, *rest)
        assert torch.equal(mask((4, 30, *rest), 0.4, True), expected), rest
    assert dropout(torch.ones(()), 0.5).shape == ()


@pytest.mark.parametrize("sizes", [(8, 32, 29, 31), (3, 70, 7, 7)], ids=str)
def test_the_same_bits_on_any_number_of_threads(sizes: tuple[int, ...]) -> None:
    # Large enough for several tasks. Of instruction sets: tests/ops/test_cpu_levels.py.
    threads = torch.get_num_threads()
    try:
        for layout, per_channel in itertools.product(LAYOUTS.values(), (False, True)):
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(mask(sizes, 0.1, per_channel, memory_format=layout))
            assert torch.equal(*found), (layout, per_channel)
    finally:
        torch.set_num_threads(threads)


# ---- statistics: these seeds are fixed, whatever --seed says, so that a test that passes always
# passes. Each limit is what a good generator exceeds with probability 1e-6 (per value looked at;
# about 100 are).

Z = 4.9  # two-sided, of a standard normal


def assert_chi_square(total: float, degrees: int) -> None:
    """Neither too uneven nor too even."""
    tail = torch.special.gammaincc(*torch.tensor([degrees / 2, total / 2]).double().unbind())
    assert 5e-7 < tail < 1 - 5e-7, f"chi-square {total:.1f} of {degrees} degrees"


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 0.003, 1 - 2**-15])
def test_as_many_are_kept_as_promised(p: float) -> None:
    q, count = threshold(p) / 2**32, 2**22
    kept = mask((count,), p).sum().item()
    assert abs(kept - count * q) < Z * (count * q * (1 - q)) ** 0.5


@pytest.mark.parametrize("per_channel", [False, True])
def test_positions_and_consecutive_seeds_are_alike(per_channel: bool) -> None:
    # Of 512 consecutive seeds: how often is each position kept, and how many has each seed.
    p, seeds = 0.3, 512
    q = threshold(p) / 2**32
    sizes = (4, 512, 1, 2) if per_channel else (2, 8, 8, 16)
    bits = torch.stack([mask(sizes, p, per_channel, seed) for seed in range(seeds)]).double()
    bits = bits[..., 0].flatten(1) if per_channel else bits.flatten(1)
    for dim in (0, 1):
        counts, n = bits.sum(dim), bits.shape[dim]
        assert_chi_square(((counts - n * q).square() / (n * q * (1 - q))).sum().item(), len(counts))


def test_neighbours_are_independent() -> None:
    # Correlations over distances within a block (1 ... 7), across blocks, vectors and warps' tiles,
    # from row to row, channel to channel and image to image; and with the seeds nearby.
    p, sizes = 0.4, (4, 32, 32, 32)
    q = threshold(p) / 2**32
    bits = mask(sizes, p).flatten().double() - q

    def assert_uncorrelated(a: Tensor, b: Tensor, what: Any) -> None:
        assert abs((a * b).sum().item()) < Z * q * (1 - q) * len(a) ** 0.5, what

    for lag in [*range(1, 18), 32, 64, 128, 255, 256, 512, 1024, 2048, 32 * 1024]:
        assert_uncorrelated(bits[:-lag], bits[lag:], lag)
    for step in (1, 2, 2**31, 2**32, 2**62):
        other = mask(sizes, p, seed=DROPOUT_SEED + step).flatten().double() - q
        assert_uncorrelated(bits, other, step)


# ---- torch's rules -----------------------------------------------------------------------------


def test_nothing_to_do_returns_the_input() -> None:
    # Itself, as F.dropout does: no copy, no random number drawn.
    x, residual = torch.randn(2, 2, 3, 4, 5).unbind()
    for args in ((0.0, True), (0.5, False)):
        state = torch.get_rng_state()
        assert dropout(x, *args) is x
        assert torch.equal(dropout(x, *args, residual=residual), x + residual)
        y = x.clone()
        assert dropout(y, *args, inplace=True, residual=residual) is y
        assert torch.equal(y, x + residual)
        assert torch.equal(torch.get_rng_state(), state)
    empty = torch.empty(0, 3, 4, 5)
    assert dropout(empty, 0.5) is empty


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_or_nothing_is_kept_where_p_is_0_or_1(layout: str) -> None:
    # The largest draw, which no threshold below 2^32 keeps: one seed and place of it.
    seed, index = 46536, 29573
    assert draws(seed, torch.tensor([index])).item() == 2**32 - 1
    for per_channel, dtype, p in itertools.product((False, True), DTYPES, (0.0, 1.0)):
        sizes = (1, index + 1, 1, 2) if per_channel else (1, 463, 8, 8)
        x = torch.ones(sizes, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        y = raw(x, None, torch.tensor(seed), p, per_channel)
        assert torch.equal(y, x * (1 - p)), (per_channel, dtype, p)
        assert torch.equal(reference.dropout(x, seed, p, None, per_channel), y)


def test_everything_dropped_and_not_finite() -> None:
    # p = 1 gives zeros and zero gradients; a dropped NaN or infinity is a NaN, as in PyTorch.
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = dropout(x, 1.0, residual=x.detach())
    y.sum().backward()
    assert torch.equal(y, x)
    assert not x.grad.any()
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    for dtype in DTYPES:
        for function in (F.dropout, dropout):
            assert str(function(bad.to(dtype), 1.0).tolist()) == "[nan, nan, nan, 0.0]"


def test_in_place_is_torchs() -> None:
    x = torch.randn(2, 6, 4, 4)
    seed_all(1)
    expected = dropout(x, 0.5)
    seed_all(1)
    y = x.clone()
    assert dropout(y, 0.5, inplace=True) is y
    assert torch.equal(y, expected)
    for fn in (F.dropout, dropout):
        leaf = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            fn(leaf, 0.5, inplace=True)
        assert torch.equal(leaf, x)
        with pytest.raises(RuntimeError, match="view"):
            fn(x.clone().requires_grad_().unbind()[0], 0.5, inplace=True)
        # What backward needs was overwritten: autograd says so.
        kept = x.clone().requires_grad_().sigmoid()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fn(kept, 0.5, inplace=True).sum().backward()
    whole = x.clone().requires_grad_()
    part = (whole * 1)[1]
    dropout(part, 0.5, inplace=True).sum().backward()
    assert torch.equal(whole.grad[1] != 0, part.detach() != 0)
    assert not whole.grad[0].any()


def test_gradients_of_any_layout_keep_only_the_seed() -> None:
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert saved_for_backward(lambda: dropout(x, 0.5), exclude=[x]) == 8
    for dy in (torch.ones(()).expand(x.shape), torch.randn(x.shape), torch.randn(2, 6, 5, 4).mT):
        y = dropout(x, 0.5)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, dy * (y.detach() != 0) * 2)
        assert dx.stride() == x.stride()


def test_generators() -> None:
    x = torch.ones(2, 4, 8, 8)

    state = torch.get_rng_state()
    assert torch.equal(dropout(x, generator=seeded(7)), dropout(x, generator=seeded(7)))
    assert torch.equal(torch.get_rng_state(), state)  # the default one is left alone
    assert not torch.equal(dropout(x), dropout(x))


@pytest.mark.parametrize("kind", [(Dropout, nn.Dropout), (Dropout2d, nn.Dropout2d)])
def test_layers(kind: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    # isinstance, repr and arguments are torch's; evaluation passes the input through.
    ours, theirs = (make(0.25, inplace=True) for make in kind)
    assert isinstance(ours, kind[1])
    assert repr(ours) == repr(theirs)
    # 256 channels. Half of them dropped lie 9 deviations away, and none has a probability of 1e-32.
    x, residual = torch.randn(2, 8, 32, 5, 5, dtype=torch.float64).unbind()
    y = ours(x.clone(), residual)
    dropped = (y == residual).flatten(2).double().mean(2)
    assert set(dropped.flatten().tolist()) == {0.0, 1.0} or kind[0] is Dropout
    assert 0 < dropped.mean() < 0.5
    assert ours.eval()(x) is x


@pytest.mark.parametrize("per_channel", [False, True])
def test_vmap_follows_torchs_randomness(per_channel: bool) -> None:
    x = torch.ones(3, 2, 8, 4, 5)

    def samples(randomness: str) -> Tensor:
        def run(t: Tensor) -> Tensor:
            return dropout(t, 0.5, per_channel=per_channel)

        return torch.vmap(run, randomness=randomness)(x)

    with pytest.raises(RuntimeError, match="randomness error mode"):
        samples("error")
    for randomness in ("same", "different"):
        y = samples(randomness)
        assert ((y == 0) | (y == 2)).all()
        assert torch.equal(y[0], y[1]) == (randomness == "same")
    grads = torch.vmap(torch.func.grad(lambda t: dropout(t, 0.5).sum()), randomness="same")(x)
    assert torch.equal(grads[0], grads[2])
    assert set(grads.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_both_orders(layout: str, per_channel: bool) -> None:
    # It is linear in x: the double backward of a gradient penalty is the same map once more.
    seed_all(0)
    x, residual = (
        torch.randn(2, 3, 3, 5, dtype=torch.float64)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for _ in range(2)
    )

    def run(x: Tensor, residual: Tensor) -> Tensor:
        seed_all(1)
        return dropout(x, 0.4, residual=residual, per_channel=per_channel)

    assert gradcheck(run, (x, residual))
    assert gradgradcheck(run, (x, residual))


def test_meta_and_autocast() -> None:
    # Sizes without numbers; and autocast, which leaves dropout alone as it does PyTorch's.
    x = torch.empty(4, 3, 8, 8, device="meta", requires_grad=True)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            t = torch.ones(2, 3, dtype=dtype)
            assert dropout(t, 0.5).dtype is F.dropout(t, 0.5).dtype is dtype
