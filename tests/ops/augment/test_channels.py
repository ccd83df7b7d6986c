"""What augment is given for each channel, against torchvision: mean, std, fill and erase_value; and
for masks their fill."""

import itertools
from typing import Any

import pytest
import torch
from support.augment_cases import SIZE, smooth_images, with_values
from support.oracles import torchvision_transforms as v2
from support.shapes import LAYOUTS

from fastcnn.augment import Augment
from fastcnn.functional import augment

F = v2.functional
BILINEAR = v2.InterpolationMode.BILINEAR
# No channel's number is another's, so that one that takes its neighbour's is seen.
MEAN, STD = (0.485, 0.406, -0.25), (0.229, 0.5, 1.75)
# Five roundings on either side (level / 255 or its scale, 1 / std, the shift, a product, the sum),
# each of a number no larger than this.
LARGEST = max((1 + abs(m)) / s for m, s in zip(MEAN, STD, strict=True))
LIMIT = 10 * LARGEST * torch.finfo(torch.float32).eps / 2
FILL, ERASED = (10.0, 250.0, 127.0), (-1.0, 0.25, 3.0)


@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalise(layout: str, c: int) -> None:
    images = smooth_images(2, c, *SIZE).contiguous(memory_format=LAYOUTS[layout])
    p, mean, std = with_values(2, SIZE), MEAN[:c], STD[:c]
    expected = F.normalize(images.float() / 255, list(mean), list(std))
    for out in LAYOUTS.values():
        actual = augment(images, p, mean=mean, std=std, memory_format=out)
        assert (actual - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
def test_fill_and_erase_value(c: int) -> None:
    # Half of the image is shifted out: fill, which is normalised; the rectangle's value is not.
    fill, erased = FILL[:c], ERASED[:c]
    p = with_values(2, SIZE, translate=[0, 20], erase=[30, 2, 5, 9])
    for layout, out in itertools.product(LAYOUTS.values(), repeat=2):
        images = smooth_images(2, c, *SIZE).contiguous(memory_format=layout)
        options: dict[str, Any] = {"fill": fill, "erase_value": erased, "memory_format": out}
        y = augment(images, p, mean=MEAN[:c], std=STD[:c], **options)
        x = F.affine(images, 0, [0, 20], 1.0, [0.0], BILINEAR, fill=list(fill))
        x = F.normalize(x.float() / 255, list(MEAN[:c]), list(STD[:c]))
        x = F.erase(x, 30, 2, 5, 9, v=torch.tensor(erased)[:, None, None])
        assert (y - x).abs().max() <= LIMIT  # a shift by whole pixels: no level is blended
        assert torch.equal(y[:, :, 30:35, 2:11], x[:, :, 30:35, 2:11])
        shown = (torch.tensor(fill) / 255 - torch.tensor(MEAN[:c])) / torch.tensor(STD[:c])
        assert (y[0, :, 3, 4] - shown).abs().max() <= LIMIT


@pytest.mark.parametrize(
    ("dtype", "fill"), [("uint8", 0), ("uint8", 255), ("int64", -100), ("int64", 2**40)]
)
def test_mask_fill(dtype: str, fill: int) -> None:
    # Of int64 masks -1 and -100 too, the labels that losses ignore: Augment cannot refuse them.
    images, labels = smooth_images(2, 3, *SIZE), torch.ones(2, *SIZE).to(getattr(torch, dtype))
    p = with_values(2, SIZE, translate=[0, 20])
    followed = Augment(mask_fill=fill).apply_parameters(images, p, labels)[1]
    assert (followed[:, :20] == fill).all()
    assert (followed[:, 20:] == 1).all()
