"""fastcnn.plan.measure against counts made by hand."""

import gc
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastcnn.lab import interleaved, ratio, saved_for_backward

FLOAT = 4  # bytes


def test_two_layers_counted_by_hand() -> None:
    # Linear keeps its input and, for dx, its weight; tanh keeps its output, which is the second
    # Linear's input: one storage. mean keeps nothing.
    net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    x = torch.randn(8, 10)
    x_bytes, hidden, weight2 = 8 * 10 * FLOAT, 8 * 20 * FLOAT, 20 * 5 * FLOAT
    # x needs no gradient, so that the first weight is not kept.
    assert saved_for_backward(lambda: net(x).mean()) == x_bytes + hidden + weight2
    assert saved_for_backward(lambda: net(x).mean(), exclude=net.parameters()) == x_bytes + hidden
    assert saved_for_backward(lambda: net(x).mean(), exclude=[*net.parameters(), x]) == hidden


def test_a_storage_counts_once_and_whole() -> None:
    # Two views of one storage are saved, neither covers it; the storage stays in memory whole.
    base = torch.randn(100)
    weight = torch.randn(10, requires_grad=True)

    def forward() -> Tensor:
        return (weight * base[:10] + weight * base[5:15]).sum()

    assert saved_for_backward(forward, exclude=[weight]) == 100 * FLOAT


def test_excluding_a_view_excludes_its_storage() -> None:
    # A parameter may be a view into one flat buffer, as optimizers and DDP make them.
    flat = torch.randn(100)
    weight = flat[:10].requires_grad_()
    x = torch.randn(10)
    assert saved_for_backward(lambda: (weight * x).sum(), exclude=[weight]) == 10 * FLOAT


def test_freed_intermediates_do_not_count() -> None:
    # The first product's graph dies within forward; were its storage held, its bytes would count,
    # were it forgotten too early, the next tensor could take its address and go uncounted.
    weight = torch.randn(1000, requires_grad=True)

    def forward() -> Tensor:
        for _ in range(3):
            y = weight * torch.randn(1000)
        return y.sum()

    assert saved_for_backward(forward, exclude=[weight]) == 1000 * FLOAT


def test_many_tensors_of_one_size_are_all_counted() -> None:
    # Equal sizes invite the allocator to reuse an address as soon as one is free.
    x = torch.randn(50, requires_grad=True)

    def forward() -> Tensor:
        y = x
        for _ in range(20):
            y = y.sigmoid()  # keeps its output
        return y

    assert saved_for_backward(forward) == 20 * 50 * FLOAT


def test_checkpointing_is_seen_to_save_memory() -> None:
    # The tool must see exactly what such techniques win: here x instead of x and two tanh.
    x = torch.randn(100, requires_grad=True)

    def two_tanh(x: Tensor) -> Tensor:
        return x.tanh().tanh().sum()

    assert saved_for_backward(lambda: two_tanh(x)) == 2 * 100 * FLOAT
    saved = saved_for_backward(lambda: checkpoint(two_tanh, x, use_reentrant=False), exclude=[x])
    assert saved < 100 * FLOAT  # its bookkeeping: one byte at most a saved tensor


def test_backward_still_works_and_nothing_leaks() -> None:
    x = torch.randn(10, requires_grad=True)
    outputs = []

    def forward() -> Tensor:
        y = x.tanh()
        outputs.append(weakref.ref(y))
        loss = y.sum()
        loss.backward()  # through the hooks
        return x.sin()

    saved_for_backward(forward)
    # Two roundings on either side, of values up to 1.
    expected = 1 - x.detach().tanh() ** 2
    assert (x.grad - expected).abs().max() <= 2 * torch.finfo(x.dtype).eps
    gc.collect()
    assert outputs[0]() is None


def test_a_forward_that_drops_its_result_is_refused() -> None:
    # Its graph would be gone before the count, and 0 bytes look like a success.
    with pytest.raises(ValueError, match=r"fn: expected to return .* got None"):
        saved_for_backward(lambda: None)


def test_interleaved_takes_turns_and_alternates() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(runs, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "cba" + "abc" + "cba"
    # Warm-up is not reported.
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleaved_reports_seconds() -> None:
    start = time.perf_counter()
    times = interleaved({"sleep": lambda: time.sleep(0.02)}, repeats=1, warmup=0)
    assert 0.02 <= times["sleep"][0] <= time.perf_counter() - start


def test_interleaved_by_another_clock() -> None:
    def clock(run: Callable[[], object]) -> float:
        run()
        return float(len(calls))

    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(runs, repeats=2, warmup=1, seconds=clock)
    assert times == {"a": [4.0, 5.0], "b": [3.0, 6.0]}  # after a and b, b a, a b


@pytest.mark.parametrize(("repeats", "warmup", "name"), [(0, 0, "repeats"), (1, -1, "warmup")])
def test_interleaved_refuses_nothing_to_report(repeats: int, warmup: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        interleaved({"a": lambda: None}, repeats, warmup)


def test_ratio_pairs_the_rounds() -> None:
    # A slow spell covers both candidates of rounds 2 and 3. b is twice as fast in every round; the
    # ratio of the lists' medians (20 / 1) or of their means would not say so.
    assert ratio([2, 20, 200], [1, 10, 100]) == 2
    assert ratio([2, 200, 20, 2], [1, 100, 1, 1]) == 2  # and one disturbed pair does no harm


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_refuses_unpaired_times(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=f"got {len(a)} and {len(b)}"):
        ratio(a, b)
