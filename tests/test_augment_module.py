"""fastcnn.augment: what is drawn, from where, and how batches reach it."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_augment import EVERYTHING, SIZE, draw_everything, smooth_images, with_values
from torch import Tensor
from torch.utils.data import DataLoader

from fastcnn.augment import Augment, AugmentParameters, Collate
from fastcnn.augment.stream import words
from fastcnn.functional import augment

MANY = 4000


def fields(p: AugmentParameters) -> dict[str, Tensor]:
    return dataclasses.asdict(p)


def same(a: AugmentParameters, b: AugmentParameters) -> bool:
    return all(torch.equal(t, fields(b)[name]) for name, t in fields(a).items())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_stream_is_philox() -> None:
    # Random123's known answer: counter 243f6a88 85a308d3 13198a2e 03707344 is out of reach (the
    # third word counts blocks, the fourth is 0), all zeros is not.
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0, torch.zeros(1, dtype=torch.int64), 4)[0].tolist() == expected


def test_parameters_are_a_sample_s_own() -> None:
    # Of the seed and the key: not of the batch, the order, or what else is switched on.
    module = Augment((20, 30), **EVERYTHING)
    keys = torch.tensor([7, -3, 2**60, 0, 11])
    p = module.draw(5, SIZE, seeded(1), keys=keys)
    order = torch.tensor([4, 2, 0])
    assert same(module.draw(3, SIZE, seeded(1), keys=keys[order]), p[order])
    assert same(module.draw(1, SIZE, seeded(1), keys=keys[3:4]), p[3])
    assert not same(module.draw(5, SIZE, seeded(2), keys=keys), p)
    assert same(module.draw(12, SIZE, seeded(1))[11], p[4])  # keys are 0 to n - 1 if not given
    less = Augment((20, 30), **(EVERYTHING | {"degrees": 0, "erasing": 0.0}))
    for name, t in fields(less.draw(5, SIZE, seeded(1), keys=keys)).items():
        if name not in ("angle", "erase"):
            assert torch.equal(t, fields(p)[name]), name


def test_drawn_values_fill_their_ranges() -> None:
    # Uniform: mean within five standard errors of the middle, and a hundredth of the range reached
    # at either end, which 4000 draws miss with probability 0.99^4000 = 3e-18.
    p = Augment((20, 30), **EVERYTHING).draw(MANY, SIZE, seeded(0))
    for values, low, high in (
        (p.angle, -30, 30), (p.scale, 0.7, 1.4), (p.shear[:, 0], -10, 10), (p.shear[:, 1], -5, 5),
        (p.brightness, 0.6, 1.4), (p.contrast, 0.5, 1.5), (p.saturation, 0.5, 1.5),
        (p.hue, -0.3, 0.3), (p.noise, 0, 0.1), (p.translate[:, 0], -10.2, 10.2),
        (p.translate[:, 1], -3.7, 3.7),
    ):  # fmt: skip
        width = high - low
        assert (values.mean() - (low + high) / 2).abs() < 5 * width / (12 * MANY) ** 0.5
        assert low - 0.5 <= values.min() < low + 0.01 * width  # 0.5: translations are whole
        assert high + 0.5 >= values.max() > high - 0.01 * width
    assert torch.equal(p.translate, p.translate.round())
    for flips in (p.horizontal_flip, p.vertical_flip, p.erase[:, 2] > 0):
        assert (flips.float().mean() - 0.5).abs() < 5 * 0.5 / MANY**0.5
    assert len(p.noise_seed.unique()) == MANY


def test_boxes_are_torchvision_s() -> None:
    # Areas and ratios in their ranges (but for whole pixels), boxes inside, all places reached.
    module = Augment((16, 16), crop_scale=(0.2, 0.5), erasing=1.0, erasing_scale=(0.1, 0.2))
    p = module.draw(MANY, (100, 140), seeded(0))
    # RandomErasing's ratio is height / width, RandomResizedCrop's width / height.
    for box, (h, w), areas, ratios, upright in (
        (p.crop, (100, 140), (0.2, 0.5), (3 / 4, 4 / 3), False),
        (p.erase, (16, 16), (0.1, 0.2), (0.3, 3.3), True),
    ):
        top, left, height, width = box.unbind(1)
        slack = 1 / height + 1 / width
        area, ratio = height * width / (h * w), height / width if upright else width / height
        assert (area >= areas[0] * (1 - slack)).all()
        assert (area <= areas[1] * (1 + slack)).all()
        assert (ratio >= ratios[0] * (1 - slack)).all()
        assert (ratio <= ratios[1] * (1 + slack)).all()
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= h).all()
        assert (left + width <= w).all()
    assert (p.erase[:, 2] > 0).all()
    crops = Augment((90, 130)).draw(MANY, (100, 140), seeded(0)).crop
    assert crops[:, 0].unique().tolist() == list(range(11))
    assert crops[:, 1].unique().tolist() == list(range(11))
    # No crop of this scale fits into so thin an image: torchvision's fallback, its full height.
    thin = Augment((8, 8), crop_scale=(0.9, 1.0)).draw(3, (10, 100), seeded(0)).crop
    assert thin[:, 2:].tolist() == [[10, 13]] * 3
    assert thin[:, :2].tolist() == [[0, 43]] * 3


def test_parameters_are_saved_and_replayed(tmp_path: Path) -> None:
    images, p = smooth_images(3, 3, *SIZE), draw_everything(3, SIZE, (20, 30))
    expected = augment(images, p, size=(20, 30))
    torch.save(fields(p), tmp_path / "parameters.pt")
    loaded = AugmentParameters(**torch.load(tmp_path / "parameters.pt", weights_only=True))
    for again in (loaded, pickle.loads(pickle.dumps(p)), copy.deepcopy(p), p[:], p.to("cpu")):
        assert torch.equal(augment(images, again, size=(20, 30)), expected)
    assert torch.equal(augment(images[-1:], p[-1], size=(20, 30)), expected[-1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.angle = torch.zeros(3)  # type: ignore[misc]
    with pytest.raises(IndexError):
        p[3]


def test_evaluation_crops_in_the_centre_and_normalises() -> None:
    images = smooth_images(2, 3, 40, 61)
    module = Augment((20, 30), **(EVERYTHING | {"crop_scale": None}), mean=0.5, std=0.2).eval()
    assert torch.equal(module(images), module(images))
    expected = (images[:, :, 10:30, 16:46] / 255 - 0.5) / 0.2  # 15.5: torchvision's round to even
    # Up to 2.5, by three roundings on either side.
    assert (module(images) - expected).abs().max() <= 6 * 2.5 * torch.finfo(torch.float32).eps
    # With RandomResizedCrop: the largest box of size's shape, 40 x 60, resized.
    module = Augment((20, 30), crop_scale=(0.1, 1.0)).eval()
    resized = augment(images, with_values(2, (40, 61), crop=[0, 0, 40, 60]), size=(20, 30))
    assert torch.equal(module(images), resized)
    same_size = Augment(**(EVERYTHING | {"crop_scale": None})).eval()
    # A product with 1 / 255, which is rounded too, beside a quotient.
    assert (same_size(images) - images / 255).abs().max() <= torch.finfo(torch.float32).eps


def test_forward_draws_once_and_gives_masks() -> None:
    images, masks = smooth_images(4, 3, *SIZE), torch.randint(0, 9, (4, 1, *SIZE))
    module = Augment((20, 30), **EVERYTHING)
    p = module.draw(4, SIZE, seeded(3))
    y, m = module(images, masks, generator=seeded(3))
    expected = module.apply_parameters(images, p, masks)
    assert torch.equal(y, expected[0])
    assert torch.equal(m, expected[1])


class Pictures(torch.utils.data.Dataset[Any]):
    """24 pictures of two sizes in two layouts, with labels or masks, and their indices as keys."""

    def __init__(self, masks: bool, keys: bool, sizes: int) -> None:
        self.masks, self.keys, self.sizes = masks, keys, sizes

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        h, w = ((40, 50), (30, 44))[i % self.sizes]
        image = smooth_images(1, 3, h, w + 0)[0].roll(i, 1)
        target = torch.full((h, w), i % 7) if self.masks else i
        return (image, target, i) if self.keys else (image, target)


def epoch(dataset: Pictures, workers: int, seed: int | None = 5, **kwargs: Any) -> dict[Any, Any]:
    collate = pickle.loads(pickle.dumps(Collate(Augment((20, 30), **EVERYTHING), seed)))
    loader = DataLoader(
        dataset, batch_size=5, num_workers=workers, collate_fn=collate, generator=seeded(1),
        multiprocessing_context="fork" if workers else None, **kwargs,
    )  # fmt: skip
    found = {}
    for images, targets in loader:
        for image, target in zip(images, targets, strict=True):
            key = len(found) if targets.dim() > 1 else int(target)
            found[key] = (image.clone(), target.clone())
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("sizes", [1, 2])
def test_workers_and_order_change_nothing_with_keys(sizes: int) -> None:
    dataset = Pictures(masks=False, keys=True, sizes=sizes)
    expected = epoch(dataset, 0)
    for found in (epoch(dataset, 2), epoch(dataset, 0, shuffle=True), epoch(dataset, 2)):
        assert sorted(found) == list(range(24))
        assert all(torch.equal(found[i][0], expected[i][0]) for i in range(24))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_without_keys_repeat_with_the_loader_s_seed() -> None:
    dataset = Pictures(masks=True, keys=False, sizes=1)
    first, second = epoch(dataset, 2, None), epoch(dataset, 2, None)
    for i in range(24):
        assert torch.equal(first[i][0], second[i][0])
        assert torch.equal(first[i][1], second[i][1])
        assert first[i][1].dtype is torch.int64
        assert set(first[i][1].unique().tolist()) <= {i % 7, 255}
    assert not torch.equal(first[0][0], first[5][0].roll(-5, 1))


def test_collate_names_what_it_does_not_take() -> None:
    collate = Collate(Augment())
    with pytest.raises(TypeError, match=r"Collate: expected samples \(image, target\) or .* got"):
        collate([torch.zeros(3, 4, 4)])
    with pytest.raises(TypeError, match="Collate: image: expected a Tensor, got str"):
        collate([("x", 1)])
    with pytest.raises(ValueError, match="Collate: samples: expected at least one, got none"):
        collate([])
    small, large = torch.zeros(3, 4, 4).byte(), torch.zeros(3, 5, 4).byte()
    with pytest.raises(
        ValueError, match=r"Collate: key: .* in none, got 1 with a key of 2 samples"
    ):
        collate([(small, 1, 7), (small, 1)])
    with pytest.raises(ValueError, match=r"Collate: image: .* got \[3, 4, 4\] and \[3, 5, 4\]; bu"):
        collate([(large, 1), (small, 1)])


def test_collate_takes_no_seed_without_keys() -> None:
    # Keys by position in the batch would repeat the first batch's augmentation in all the others.
    samples = [(smooth_images(1, 3, *SIZE)[0], i) for i in range(3)]
    with pytest.raises(ValueError, match=r"Collate: seed, key: .* got seed=5 .*; give each its"):
        Collate(Augment(**EVERYTHING, size=(20, 30)), seed=5)(samples)
    collate = Collate(Augment(**EVERYTHING, size=(20, 30)))
    assert not torch.equal(collate(samples)[0], collate(samples)[0])


# What replaces a good argument of the module, the error, and what its message names.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"degrees": -1}, ValueError, r"degrees: expected a finite number of at least 0, got -1"),
    ({"degrees": float("inf")}, ValueError, r"degrees: expected a finite number of at least 0,"),
    ({"degrees": (20, 10)}, ValueError, r"degrees: expected a range .* got \(20.0, 10.0\)"),
    ({"degrees": (1, 2, 3)}, ValueError, r"degrees: expected 2 numbers"),
    ({"degrees": "all"}, TypeError, r"degrees: expected a sequence of numbers, got 'all'"),
    ({"translate": (0.1, 1.5)}, ValueError, r"translate: expected shares from 0 to 1"),
    ({"scale": (0, 1)}, ValueError, r"scale: expected a range of finite numbers above 0, the low"),
    ({"scale": (1.2, 0.8)}, ValueError, r"scale: expected a range"),
    ({"shear": 90}, ValueError, r"shear: .* number of at least 0 and below 90, got 90"),
    ({"shear": (0, 90)}, ValueError, r"shear: .* numbers above -90 and below 90, the lower"),
    ({"shear": (0, 1, 2)}, ValueError, r"shear: expected 2 or 4 numbers"),
    ({"crop_scale": (0.5, 1.5)}, ValueError, r"crop_scale: .* above 0 and at most 1,"),
    ({"crop_ratio": (2, 1)}, ValueError, r"crop_ratio: .* above 0, the lower end first, got"),
    ({"horizontal_flip": 1.1}, ValueError, r"horizontal_flip: expected a probability .* got 1.1"),
    ({"vertical_flip": -0.1}, ValueError, r"vertical_flip: expected a probability"),
    ({"erasing": float("nan")}, ValueError, r"erasing: expected a probability"),
    ({"vertical_flip": None}, TypeError, r"vertical_flip: expected a number, got None"),
    ({"brightness": -0.5}, ValueError, r"brightness: expected a finite number of"),
    ({"contrast": (-1, 1)}, ValueError, r"contrast: .* numbers of at least 0, the lower"),
    ({"saturation": (2, 1)}, ValueError, r"saturation: expected a range"),
    ({"hue": 0.6}, ValueError, r"hue: .* number of at least 0 and at most 0.5, got 0.6"),
    ({"hue": (-0.6, 0.1)}, ValueError, r"hue: .* of at least -0.5 and at most 0.5,"),
    ({"noise": -1}, ValueError, r"noise: expected a range"),
    ({"size": (0, 5)}, ValueError, r"size: expected a height and a width from 1"),
    ({"size": 5}, TypeError, r"size: expected a height and a width, got 5"),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_ranges_are_checked_at_construction(
    bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^Augment: .*{message}"):
        Augment(**bad)


def test_draw_and_forward_name_what_they_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"images: expected at least \[20, 30\], .* \[37, 20\]"):
        Augment((20, 30)).draw(1, (37, 20))
    with pytest.raises(ValueError, match=r"keys: expected sizes \[2\], got \[3\]"):
        Augment().draw(2, SIZE, keys=torch.arange(3))
    with pytest.raises(TypeError, match="keys: expected an int64 Tensor"):
        Augment().draw(2, SIZE, keys=torch.zeros(2))
    for n, error, message in [(-1, ValueError, "at least 0, got -1"), (2.0, TypeError, "an int")]:
        with pytest.raises(error, match=f"Augment: n: expected {message}"):
            Augment().draw(n, SIZE)
        with pytest.raises(error, match=f"Augment: n: expected {message}"):
            Augment().center(n, SIZE)
    with pytest.raises(
        TypeError, match=r"Augment: generator: expected a torch.Generator .* got int"
    ):
        Augment().draw(2, SIZE, 5)
    with pytest.raises(TypeError, match=r"images: expected uint8, got torch.float32"):
        Augment()(torch.zeros(1, 3, 4, 4))
