"""README: what it shows runs, and what it names exists."""

import re

import torch
from support.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_the_example_trains() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    scope: dict[str, object] = {}
    images = "8, 3, 224, 224"
    assert images in example[1]
    exec(example[1].replace(images, "2, 3, 64, 64").replace("(8,)", "(2,)"), scope)
    assert isinstance(scope["loss"], torch.Tensor)
    assert torch.isfinite(scope["loss"])


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^    make (\w+)", README, re.MULTILINE)) <= set(targets)
