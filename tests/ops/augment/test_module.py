"""fastcnn.augment.Augment: what is drawn, and from where."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.augment_cases import EVERYTHING, SIZE, draw_everything, smooth_images, with_values
from support.seeds import seed_all, seeded
from torch import Tensor

from fastcnn.augment import Augment, AugmentParameters, Collate, draw as drawing
from fastcnn.common.philox import words
from fastcnn.functional import augment

MANY = 4000


def fields(p: AugmentParameters) -> dict[str, Tensor]:
    return dataclasses.asdict(p)


def same(a: AugmentParameters, b: AugmentParameters) -> bool:
    return all(torch.equal(t, fields(b)[name]) for name, t in fields(a).items())


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
    # Uniform: mean within 5.5 standard errors of the middle, which one of 14 good ones exceeds with
    # a probability of 5e-7; and a hundredth of the range reached at either end, which 4000 draws
    # miss with 0.99^4000 = 3e-18.
    p = Augment((20, 30), **EVERYTHING).draw(MANY, SIZE, seeded(0))
    for values, low, high in (
        (p.angle, -30, 30), (p.scale, 0.7, 1.4), (p.shear[:, 0], -10, 10), (p.shear[:, 1], -5, 5),
        (p.brightness, 0.6, 1.4), (p.contrast, 0.5, 1.5), (p.saturation, 0.5, 1.5),
        (p.hue, -0.3, 0.3), (p.noise, 0, 0.1), (p.translate[:, 0], -10.2, 10.2),
        (p.translate[:, 1], -3.7, 3.7),
    ):  # fmt: skip
        width = high - low
        assert (values.mean() - (low + high) / 2).abs() < 5.5 * width / (12 * MANY) ** 0.5
        assert low - 0.5 <= values.min() < low + 0.01 * width  # 0.5: translations are whole
        assert high + 0.5 >= values.max() > high - 0.01 * width
    assert torch.equal(p.translate, p.translate.round())
    for flips in (p.horizontal_flip, p.vertical_flip, p.erase[:, 2] > 0):
        assert (flips.float().mean() - 0.5).abs() < 5.5 * 0.5 / MANY**0.5
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


@pytest.mark.parametrize("crop_scale", [None, (0.2, 0.5)], ids=["placed", "resized"])
def test_the_largest_word_is_below_one(crop_scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32 2^32 - 1 rounds to 2^32: a crop one pixel outside, a flip that p=1 leaves out.
    monkeypatch.setattr(drawing, "words", lambda _, keys, n: torch.full((len(keys), n), 2**32 - 1))
    module = Augment((16, 16), crop_scale=crop_scale, horizontal_flip=1.0, erasing=1.0)
    p = module.draw(1, (40, 50), seeded(0))
    assert (p.crop[:, :2] + p.crop[:, 2:]).tolist() == [[40, 50]]
    assert (p.erase[:, :2] + p.erase[:, 2:]).tolist() == [[16, 16]]
    assert p.horizontal_flip.all()


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


def test_samples_are_picked_by_any_kind_of_number() -> None:
    p = draw_everything(3, SIZE, (20, 30))
    for number in (-2, 1):
        for index in (np.int64(number), torch.tensor(number), np.array(number)):
            assert same(p[index], p[1])
    chosen = torch.tensor([0, 2])
    for several in (chosen, slice(0, 3, 2), [0, 2], chosen.numpy(), torch.tensor([1, 0, 1]) > 0):
        assert same(p[several], AugmentParameters(**{k: t[chosen] for k, t in fields(p).items()}))
    for beyond in (3, -4, torch.tensor(3), np.int64(-4)):
        with pytest.raises(IndexError):
            p[beyond]
    for bad in ("a", None, 1.5, (0, 1), torch.tensor(1.0), chosen[None]):
        with pytest.raises(TypeError, match=r"AugmentParameters: index: expected an int, .* got"):
            p[bad]


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_module_compiles_without_graph_breaks() -> None:
    images, keys = smooth_images(4, 3, *SIZE), torch.arange(4)
    module = Augment((20, 30), **EVERYTHING)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in (3, 4):  # the seed is drawn within the graph, anew at each call
        seed_all(seed)
        expected = module(images, keys=keys)
        seed_all(seed)
        assert torch.equal(compiled(images, keys=keys), expected)
    compiled = torch.compile(module.eval(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), module(images))


# What replaces a good argument of the module, the error, and what its message names.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"degrees": -1},
        ValueError,
        r"degrees: expected a finite float32 number of at least 0, got -1",
    ),
    (
        {"degrees": float("inf")},
        ValueError,
        r"degrees: expected a finite float32 number of at least 0,",
    ),
    (
        {"degrees": 1e39},
        ValueError,
        r"degrees: expected a finite float32 number",
    ),  # infinite in float32
    (
        {"scale": (1e-50, 1)},
        ValueError,
        r"scale: expected a range of finite float32 numbers above 0",
    ),
    ({"degrees": (20, 10)}, ValueError, r"degrees: expected a range .* got \(20.0, 10.0\)"),
    ({"degrees": (1, 2, 3)}, ValueError, r"degrees: expected 2 numbers"),
    ({"degrees": "all"}, TypeError, r"degrees: expected a sequence of numbers, got 'all'"),
    ({"translate": (0.1, 1.5)}, ValueError, r"translate: expected shares from 0 to 1"),
    (
        {"scale": (0, 1)},
        ValueError,
        r"scale: expected a range .* numbers above 0, the lower",
    ),
    ({"scale": (1.2, 0.8)}, ValueError, r"scale: expected a range"),
    ({"shear": 89.9999999}, ValueError, r"shear: .* below 90, got 89"),  # 90 in float32
    ({"shear": 90}, ValueError, r"shear: .* number of at least 0 and below 90, got 90"),
    ({"shear": (0, 90)}, ValueError, r"shear: .* numbers above -90 and below 90, the lower"),
    ({"shear": (0, 1, 2)}, ValueError, r"shear: expected 2 or 4 numbers"),
    ({"crop_scale": (0.5, 1.5)}, ValueError, r"crop_scale: .* above 0 and at most 1,"),
    ({"crop_ratio": (2, 1)}, ValueError, r"crop_ratio: .* above 0, the lower end first, got"),
    ({"horizontal_flip": 1.1}, ValueError, r"horizontal_flip: expected a probability .* got 1.1"),
    ({"vertical_flip": -0.1}, ValueError, r"vertical_flip: expected a probability"),
    ({"erasing": float("nan")}, ValueError, r"erasing: expected a probability"),
    ({"vertical_flip": None}, TypeError, r"vertical_flip: expected a number, got None"),
    ({"brightness": -0.5}, ValueError, r"brightness: expected a finite float32 number of"),
    ({"contrast": (-1, 1)}, ValueError, r"contrast: .* numbers of at least 0, the lower"),
    ({"saturation": (2, 1)}, ValueError, r"saturation: expected a range"),
    ({"hue": 0.6}, ValueError, r"hue: .* number of at least 0 and at most 0.5, got 0.6"),
    ({"hue": (-0.6, 0.1)}, ValueError, r"hue: .* of at least -0.5 and at most 0.5,"),
    ({"noise": -1}, ValueError, r"noise: expected a range"),
    ({"size": (0, 5)}, ValueError, r"size: expected a height and a width from 1"),
    ({"size": 5}, TypeError, r"size: expected a height and a width, got 5"),
    ({"mask_fill": 1.5}, TypeError, r"mask_fill: expected an int, got float"),
    ({"mask_fill": 2**63}, ValueError, r"mask_fill: expected a number that torch.int64 holds, got"),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_ranges_are_checked_at_construction(
    bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^Augment: .*{message}"):
        Augment(**bad)


def test_a_default_device_changes_nothing() -> None:
    # Parameters are drawn on the CPU, from a generator of its own.
    def draw() -> AugmentParameters:
        module = Augment((20, 30), degrees=10, crop_scale=(0.1, 1), erasing=0.5, noise=0.1)
        return module.draw(4, SIZE, generator=seeded(1))

    pairs = [(draw(), AugmentParameters.identity(2, SIZE))]
    with torch.device("meta"):  # as CUDA would be, of values that nobody can look at
        pairs.append((draw(), AugmentParameters.identity(2, SIZE)))
    for expected, found in zip(*pairs, strict=True):
        for field in dataclasses.fields(expected):
            a, e = getattr(found, field.name), getattr(expected, field.name)
            assert torch.equal(a, e), field.name


def test_a_default_device_changes_no_images() -> None:
    # As fastcnn.augment.Collate calls it in a DataLoader's workers, with labels and keys.
    def run() -> list[Tensor]:
        images = torch.zeros(2, 3, *SIZE, dtype=torch.uint8, device="cpu")
        collate = Collate(Augment((20, 30), horizontal_flip=0.5, noise=0.1, mean=0.5), seed=1)
        y = Augment((20, 30), brightness=0.2)(images, generator=seeded(1))
        return [y, *collate([(image, 3, i) for i, image in enumerate(images)])]

    expected = run()
    with torch.device("meta"):
        found = run()
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


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
