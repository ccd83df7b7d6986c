"""Augment beside a busy GPU: images and parameters come from the CPU while it works."""

from contextlib import nullcontext

import pytest
import torch
from support.device import DEVICE, HAS_GPU, needs_gpu
from support.seeds import seeded
from torch import Tensor

from fastcnn.augment import Augment
from fastcnn.ops.augment.parameters import AugmentParameters

pytestmark = pytest.mark.gpu

CYCLES = 400_000_000  # 0.2 s at a H200's 1.98 GHz
CALLS = 6


def module() -> Augment:
    return Augment(
        (28, 24), degrees=30, brightness=0.3, contrast=0.4, hue=0.1, noise=0.1, erasing=0.5,
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), dtype=torch.bfloat16,
    )  # fmt: skip


def data(seed: int) -> tuple[Tensor, Tensor, AugmentParameters]:
    generator = seeded(seed)
    images = torch.randint(256, (4, 3, 32, 30), dtype=torch.uint8, generator=generator)
    masks = torch.randint(9, (4, 32, 30), generator=generator)
    return images, masks, module().draw(4, (32, 30), generator)


def augmented(seed: int, pinned: bool) -> list[Tensor]:
    images, masks, parameters = data(seed)
    if pinned and HAS_GPU:
        images, masks = images.pin_memory(), masks.pin_memory()
    moved = (t.to(DEVICE, non_blocking=pinned) for t in (images, masks))
    return list(module().apply_parameters(next(moved), parameters, next(moved)))


@pytest.mark.parametrize("other_stream", [False, True])
def test_batches_queued_behind_other_work(other_stream: bool) -> None:
    # What was pinned, and the rows of parameters, are gone on the CPU, and their memory used again,
    # before the GPU has read them: it must have read the values of the call all the same.
    expected = []
    for seed in range(CALLS):
        expected.append(augmented(seed, pinned=False))
        if HAS_GPU:
            torch.cuda.synchronize()
    assert not torch.equal(expected[0][0], expected[1][0])
    stream = torch.cuda.stream(torch.cuda.Stream()) if HAS_GPU and other_stream else nullcontext()
    with stream:
        if HAS_GPU:
            torch.cuda._sleep(CYCLES)
        found = [augmented(seed, pinned=True) for seed in range(CALLS)]
    if HAS_GPU:
        torch.cuda.synchronize()
    for got, want in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@needs_gpu
def test_a_call_waits_for_nothing() -> None:
    # A copy that waits for the GPU would hold up the CPU until the step before is over.
    images, masks, parameters = data(0)
    images, masks = images.to(DEVICE), masks.to(DEVICE)
    module().apply_parameters(images, parameters, masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module().apply_parameters(images, parameters, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
