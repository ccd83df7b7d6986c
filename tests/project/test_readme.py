"""README: what it shows runs, what it prints is printed, and what it names exists."""

import re

import pytest
import readme_report
import torch
from support.paths import ROOT
from torch import nn

import fastcnn
from fastcnn.convert.converted import Converted

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OPS = [
    "batch_norm_act",
    "group_norm_act",
    "dropout",
    "interpolate",
    "conv_bn_act",
    "depthwise_conv2d",
    "squeeze_excite",
    "linear_act",
    "conv2d_int8",
    "augment",
]


@pytest.fixture(scope="module")
def scope() -> dict[str, object]:
    """The names that the blocks before the ops define."""
    images = "8, 3, 224, 224"
    assert images in BLOCKS[1]
    found: dict[str, object] = {}
    exec(BLOCKS[1].replace(images, "2, 3, 64, 64").replace("(8,)", "(2,)"), found)
    exec(BLOCKS[2], found)
    return found


def test_the_one_line_converts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert len(BLOCKS[0].splitlines()) == 1
    exec(BLOCKS[0], {"fastcnn": fastcnn, "model": model})
    assert isinstance(model, Converted)


def test_the_example_trains(scope: dict[str, object]) -> None:
    assert isinstance(scope["loss"], torch.Tensor)
    assert torch.isfinite(scope["loss"])


def test_each_op_has_its_equivalent() -> None:
    assert len(BLOCKS) == 3 + len(OPS)
    for op, block in zip(OPS, BLOCKS[3:], strict=True):
        assert f"fastcnn.functional.{op}(" in block or "fastcnn.augment.Augment(" in block
        assert "# Equivalent to" in block
        assert block.count("assert_close(") == 1
        assert block.startswith(f"# {op}")  # and what it is, in a line


@pytest.mark.parametrize("number", range(len(OPS)), ids=OPS)
def test_the_equivalent_is_close(number: int, scope: dict[str, object]) -> None:
    exec(BLOCKS[3 + number], scope)


def test_the_report_is_what_report_prints() -> None:
    assert readme_report.BEGIN + readme_report.block() + readme_report.END in README, (
        "run .venv/bin/python tools/readme_report.py"
    )


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    named += re.findall(r"`make (\w+)", README)
    assert named
    assert set(named) <= set(targets)


def test_the_first_sentence_has_its_numbers_from_the_table() -> None:
    first = README.split("\n\n")[1]
    row = re.search(r'^\| U-Net, training, memory="default" \|.*', README, re.MULTILINE)
    assert row is not None
    numbers = re.findall(r"\d\.\d\dx", first)
    assert len(numbers) == 2
    assert set(numbers) <= set(re.findall(r"\d\.\d\dx", row[0]))
