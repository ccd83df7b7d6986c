"""augment vs. torchvision.transforms.v2: 64 images of 256x256 to normalised 224x224 float32.

Floor in passes over the output: 1 (written once) and 1/4 (what is seen of the uint8 images). Two
baselines, since torchvision has none that does the same at once: Compose on each sample, which
gives each parameters of its own as augment does, and Compose on the batch, where all samples share
one draw. Drawing the parameters is part of every time.
"""

from typing import Any

import pytest
import torch
from support.oracles import torchvision_transforms as v2
from support.shapes import LAYOUTS
from torch import Tensor
from where import DEVICE, cases, on, tiny

from fastcnn.augment import Augment

# 4 x 12.6 MB in, 38.5 MB out; on a GPU 50 and 154 MB.
BATCH, INPUTS = on(64, 256), 4
NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EVERYTHING: dict[str, Any] = {
    "degrees": 15, "translate": (0.1, 0.1), "scale": (0.8, 1.2), "shear": 10,
    "vertical_flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    "noise": 0.05, "erasing": 0.5,
}  # fmt: skip


CASES = {
    f"{what}-{layout}-{against}": (what, LAYOUTS[name], against)
    for what in ("everything", "flip-crop-normalise")
    for layout, name in (("nchw", "nchw"), ("nhwc", "channels_last"))
    for against in ("samples", "batch")
}
GPU_CASES = ["everything-nhwc-batch", "everything-nchw-batch", "flip-crop-normalise-nchw-batch"]


def compose(everything: bool) -> Any:
    """The Compose that Augment equals, without its roundings where torchvision has uint8."""
    crop = [v2.RandomCrop(224), v2.RandomHorizontalFlip()]
    to_float = v2.ToDtype(torch.float32, scale=True)
    if not everything:
        return v2.Compose([*crop, to_float, v2.Normalize(**NORMALISE)])
    bilinear = v2.InterpolationMode.BILINEAR
    affine = v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10, interpolation=bilinear)
    return v2.Compose(
        [
            affine, *crop, v2.RandomVerticalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.1), to_float,
            v2.GaussianNoise(sigma=0.05), v2.Normalize(**NORMALISE), v2.RandomErasing(),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
def test_augment(compare: Any, case: tuple[str, torch.memory_format, str]) -> None:
    what, layout, against = case
    sizes = (*tiny(BATCH), 3, 256, 256)
    batches = [
        torch.randint(256, sizes, dtype=torch.uint8, device=DEVICE).contiguous(memory_format=layout)
        for _ in range(INPUTS)
    ]
    ranges = EVERYTHING if what == "everything" else {}
    ours = Augment((224, 224), horizontal_flip=0.5, memory_format=layout, **NORMALISE, **ranges)
    theirs = compose(what == "everything")

    def on_samples(images: Tensor) -> Tensor:
        return torch.stack([theirs(image) for image in images])

    out = torch.empty(*sizes[:2], 224, 224, device=DEVICE).contiguous(memory_format=layout)
    compare(ours, on_samples if against == "samples" else theirs, batches, 1.25, out)
