"""Random calls of augment against its reference in float64: test_ops.py says how many."""

from typing import Any

import hypothesis.strategies as st
import torch
from support.augment_cases import clear_of_ties, extent_of, level_limit
from support.fuzz_cases import DTYPES, SEEDS, SIDES, fuzz, placed
from support.fuzz_check import distance, layouts, memory, two_threads
from support.seeds import seeded
from support.shapes import LAYOUTS
from torch import Tensor

from fastcnn import functional, reference
from fastcnn.reference.augment import coordinates, masks as reference_masks

TRANSFORMS = ["affine", "crop", "flips", "brightness", "contrast", "saturation", "hue", "noise"]


def drawn_parameters(
    on: set[str], n: int, size_in: tuple[int, int], size: tuple[int, int], g: torch.Generator
) -> functional.AugmentParameters:
    """Of each sample its own; crops and erased rectangles reach beyond the image too."""

    def real(low: float, high: float, *width: int) -> Tensor:
        return torch.rand(n, *width, generator=g) * (high - low) + low

    def boxes(h: int, w: int, start: int) -> Tensor:
        corner = [torch.randint(start, side + 1, (n,), generator=g) for side in (h, w)]
        extent = [torch.randint(1, side + 4, (n,), generator=g) for side in (h, w)]
        return torch.stack([*corner, *extent], 1)

    fields = vars(functional.AugmentParameters.identity(n, size_in)).copy()
    if "affine" in on:
        fields |= {"angle": real(-180, 180), "translate": real(-9, 9, 2)}
        fields |= {"scale": real(0.4, 3), "shear": real(-40, 40, 2)}
    if "crop" in on:
        fields["crop"] = boxes(*size_in, -3)
    if "flips" in on:
        fields |= {f"{k}_flip": real(0, 1) < 0.5 for k in ("horizontal", "vertical")}
    fields |= {k: real(0, 2) for k in ("brightness", "contrast", "saturation") if k in on}
    if "hue" in on:
        fields["hue"] = real(-0.5, 0.5)
    if "noise" in on:
        limits = torch.iinfo(torch.int64)
        fields["noise"] = real(0, 0.2)
        fields["noise_seed"] = torch.randint(limits.min, limits.max, (n,), generator=g)
    if "erase" in on:
        fields["erase"] = boxes(*size, 0)
    return functional.AugmentParameters(**fields)


@fuzz(
    "augment", n=st.integers(0, 5), c=st.sampled_from([1, 3]), size_in=st.tuples(SIDES, SIDES),
    size=st.tuples(SIDES, SIDES), on=st.sets(st.sampled_from([*TRANSFORMS, "erase"])),
    layout=st.sampled_from(list(LAYOUTS)), out=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(DTYPES[:3]), fill=st.sampled_from([0.0, 90.0, 255.0]),
    offset=st.sampled_from([0, 1, 3]), labels=st.sampled_from([torch.uint8, torch.int64]),
    seed=SEEDS,
)  # fmt: skip
def test_augment(
    n: int, c: int, size_in: tuple[int, int], size: tuple[int, int], on: set[str], layout: str,
    out: str, dtype: torch.dtype, fill: float, offset: int, labels: torch.dtype, seed: int,
) -> None:  # fmt: skip
    g = seeded(seed)
    images = torch.randint(0, 256, (n, c, *size_in), generator=g).to(torch.uint8)
    images = placed(images, LAYOUTS[layout], offset)
    masks = torch.randint(0, 100, (n, *size_in), generator=g).to(labels)
    p = drawn_parameters(on, n, size_in, size, g)
    how: dict[str, Any] = {"mean": 0.4, "std": 0.5, "fill": fill, "erase_value": 0.3}
    before = memory(images)
    formats = {"dtype": dtype, "memory_format": LAYOUTS[out]}
    y, followed = functional.augment(images, p, masks=masks, size=size, **how, **formats)
    assert out in layouts(y)
    assert y.dtype is dtype
    assert torch.equal(memory(images), before)
    plain = functional.augment(images.contiguous(), p, size=size, **how)
    assert torch.equal(y, plain.to(dtype)), "other bits in another type or layout"
    with two_threads():
        for i in range(n):
            alone = functional.augment(images[i : i + 1], p[i], size=size, **how)
            assert torch.equal(alone[0], plain[i]), "other bits for a sample alone"
    expected = reference.augment(images, p, size, **how)
    assert distance(plain, expected) <= 2 * level_limit(
        images, int(extent_of(p, size_in, size)) + 1
    )
    clear = clear_of_ties(p, size_in, size)
    expected_masks = reference_masks(masks, *coordinates(p, size_in, size), 255)
    assert torch.equal(followed[clear], expected_masks[clear])
    if size == size_in and not on & {"affine", "crop"}:
        assert clear.all()
