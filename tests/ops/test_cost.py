"""Time in proportion to what is read or written, whichever is more, whatever the shape."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.shapes import LAYOUTS

from fastcnn.augment import Augment

# One long side: work that goes with its square takes thousands of times what the elements would.
LONG = 2**14
SHAPES = [
    (h_in, w_in, h, w)
    for h_in, w_in, h, w in itertools.product([1, 2, LONG], repeat=4)
    if max(h_in * w_in, h * w) <= 2 * LONG
]
# Twice the elements, one by one and not in vectors, took up to 125 times as long as a usual shape's
# (2-core AMD EPYC); a long side's square from 2000 times on.
SINGLE = 500


def seconds(call: Callable[[], Any]) -> float:
    """Return the processor's time of a call, the least of a few."""
    found = []
    for _ in range(3):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
        if found[0] > 0.1:
            break
    return min(found)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def upsampling(op: str, c: int, layout: str, sampling: int, *sizes: int) -> Callable[[], Any]:
    h_in, w_in, h, w = sizes
    last, taps = layout == "channels_last", "taps" in op
    forward = op.endswith("fwd")
    size = (1, c * (9 if taps and forward else 1), *(sizes[:2] if forward else sizes[2:]))
    x = torch.ones(size).contiguous(memory_format=LAYOUTS[layout])
    x = x.as_strided(size, torch.empty(size, memory_format=LAYOUTS[layout]).stride())
    to = (h, w) if forward else (h_in, w_in)
    arguments: list[Any] = [x, *([None] if op == "upsample_fwd" else []), *to, None, None, sampling]
    arguments += [] if taps else [last, False] if forward else [last]
    return lambda: getattr(torch.ops.fastcnn, op)(*arguments)


@pytest.mark.parametrize("sampling", [0, 2], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("c", [1, 20])  # less than a vector, and more
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "op", ["upsample_fwd", "upsample_bwd", "upsample_taps_fwd", "upsample_taps_bwd"]
)
def test_upsample(op: str, layout: str, c: int, sampling: int) -> None:
    if "taps" in op and layout != "channels_last":
        pytest.skip("channels_last alone")
    usual = seconds(upsampling(op, c, layout, sampling, 64, 64, 128, 128))
    slow = [
        (sizes, round(ratio))
        for sizes in SHAPES
        if (ratio := seconds(upsampling(op, c, layout, sampling, *sizes)) / usual) > SINGLE
    ]
    assert not slow


@pytest.mark.parametrize("layout", LAYOUTS)
def test_augment_of_a_large_image(layout: str) -> None:
    # A row of the output sees all rows of the image, and 64 pixels of them. Each row had all of the
    # image read: 200 times the time, and more on processors with small caches.
    augment = Augment((64, 64), degrees=(90, 90))
    small, large = (
        torch.zeros(1, 3, side, side, dtype=torch.uint8).contiguous(memory_format=LAYOUTS[layout])
        for side in (64, 4096)
    )
    assert seconds(lambda: augment(large)) < 20 * seconds(lambda: augment(small))
