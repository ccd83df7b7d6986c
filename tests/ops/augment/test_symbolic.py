"""augment where numbers are symbols: torch.compile of a second Augment with other values."""

from typing import Any

import pytest
import torch
from support.augment_cases import EVERYTHING, SIZE, smooth_images, with_values
from support.seeds import seed_all
from torch import Tensor

from fastcnn.augment import Augment
from fastcnn.functional import augment

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Each with the values of one program's modules: dynamo makes a symbol of a number that has changed.
CHANGING: dict[str, list[Any]] = {
    "mean": [0.1, 0.2, 0.3], "std": [(0.1, 0.2, 0.3), (0.2, 0.3, 0.4), (0.3, 0.4, 0.5)],
    "degrees": [10, 20, 30], "noise": [0.05, 0.1, (0.01, 0.2)], "hue": [0.1, 0.2, 0.3],
    "translate": [(0.1, 0.2), (0.2, 0.1), (0.3, 0.4)], "scale": [(0.5, 2.0), (0.6, 1.5)],
    "shear": [5, 10.5, (1, 2, 3, 4)], "brightness": [0.1, 0.2, 0.3], "erasing": [0.3, 0.5, 0.7],
    "crop_scale": [(0.3, 0.6), (0.4, 0.7), (0.5, 0.8)], "horizontal_flip": [0.3, 0.5, 0.9],
    "crop_ratio": [(0.5, 2), (0.6, 1.5), (0.7, 1.3)], "fill": [1.0, 2.0, 3], "mask_fill": [1, 2, 3],
    "erasing_scale": [(0.1, 0.2), (0.2, 0.3)], "erasing_ratio": [(0.3, 2), (0.4, 1.5)],
    "erase_value": [0.5, 1.5, 2.5], "size": [(20, 30), (21, 32), (22, 34)],
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch.compiler.reset()


EACH = [pytest.param({k: values}, marks=pytest.mark.slow, id=k) for k, values in CHANGING.items()]


@pytest.mark.parametrize("changing", [pytest.param(CHANGING, id="all at once"), *EACH])
def test_modules_of_several_values(changing: dict[str, list[Any]]) -> None:
    images, masks = smooth_images(3, 3, *SIZE), torch.ones(3, *SIZE, dtype=torch.int64)
    for i in range(max(map(len, changing.values()))):
        values = {k: of[min(i, len(of) - 1)] for k, of in changing.items()}
        module = Augment(**({"size": (20, 30)} | EVERYTHING | values))
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
        seed_all(1)
        expected = module(images, masks)
        seed_all(1)
        assert all(map(torch.equal, run(images, masks), expected)), values


@pytest.mark.parametrize(
    "name",
    ["mean", "fill", *(pytest.param(k, marks=pytest.mark.slow) for k in ("std", "erase_value"))],
)
def test_a_number_that_is_an_argument(name: str) -> None:
    images, p = smooth_images(3, 3, *SIZE), with_values(3, SIZE, erase=[1, 2, 3, 4], angle=20)

    def normalise(images: Tensor, value: Any) -> Tensor:
        return augment(images, p, **{name: value})

    run = torch.compile(normalise, fullgraph=True, backend="aot_eager")
    for value in (0.5, 0.25, 0.75, (0.1, 0.2, 0.3), (0.2, 0.3, 0.4)):
        assert torch.equal(run(images, value), normalise(images, value)), value
