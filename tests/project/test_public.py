"""The public names: what dir() and help() show, their docstrings' parts, and that examples run."""

import doctest
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastcnn
from fastcnn.plan.registry import OPS

MODULES = [
    fastcnn, fastcnn.functional, fastcnn.nn, fastcnn.augment, fastcnn.models, fastcnn.plan,
]  # fmt: skip
# Builders of the zoo: create_model says what they take.
BUILDERS = set(fastcnn.list_models())
# Of models and plan the functions: classes there are what functions return and ops are made of.
NAMES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))
    and name not in BUILDERS
    and (module not in (fastcnn.models, fastcnn.plan) or inspect.isfunction(getattr(module, name)))
}
# Their files name what is missing.
# It makes a weight ready, and computes nothing.
NO_OPS = {"fastcnn.functional.pack_conv2d_int8"}
# Any pattern is one, and any module.
NO_ERRORS = {
    "fastcnn.list_models",
    "fastcnn.models.list_models",
    "fastcnn.nn.convert_sync_batchnorm",
}
IN_REGISTER = {"fastcnn.plan.choose", "fastcnn.plan.run"}  # whose example calls them


def doc_of(name: str) -> str:
    return inspect.getdoc(NAMES[name]) or ""


def test_there_are_names() -> None:
    assert len(NAMES) > 40
    assert {"fastcnn.convert", "fastcnn.nn.Upsample", "fastcnn.plan.summary"} <= set(NAMES)
    assert set(NAMES) > NO_OPS | NO_ERRORS | IN_REGISTER


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_dir_shows_what_is_public(module: ModuleType) -> None:
    assert dir(module) == sorted(module.__all__)


def test_help_is_a_map() -> None:
    # Every public name, and nothing that there is not.
    text = fastcnn.__doc__ or ""
    named = set(re.findall(r"fastcnn\.(\w+)", text))
    assert named == set(fastcnn.__all__) - {"__version__"}


def is_op(name: str) -> bool:
    return name.startswith("fastcnn.functional.") and name.split(".")[-1].islower()


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_a_docstring_has_its_parts(name: str) -> None:
    value, text = NAMES[name], doc_of(name)
    function = inspect.isfunction(value)
    parameters = [*inspect.signature(value).parameters] if function else []
    returns = function and inspect.signature(value).return_annotation not in (None, "None")
    parts = {"Example:": name not in IN_REGISTER}
    parts["Args:"] = bool(parameters) or (issubclass(value, torch.nn.Module) if not function else 0)
    parts["Raises:"] = bool(parameters) and name not in NO_ERRORS
    parts["Returns:"] = returns and not re.search(r"\breturn", text.splitlines()[0], re.IGNORECASE)
    op = is_op(name) and name not in NO_OPS
    parts["Source:"] = op
    missing = [part for part, due in parts.items() if due and not re.search(f"^{part}", text, re.M)]
    assert not missing
    for parameter in parameters:
        assert re.search(rf"^ +\**{parameter}: \w*", text, re.M), f"Args: {parameter}"
    if is_op(name):
        assert re.search(r"\[(n, c|c_out)\b|as conv_bn_act's", text), "shapes"
    if name.startswith("fastcnn.nn.") and not function and issubclass(value, torch.nn.Module):
        assert ":func:`fastcnn.functional." in text, "where shapes and errors are"


@pytest.mark.parametrize("name", sorted(set(NAMES) - IN_REGISTER))
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where one may write
    # It would hold for the process, and the other tests in it.
    monkeypatch.setattr(fastcnn._C, "keep_freed_memory", lambda: True)
    fastcnn.plan._planner.cache_clear()  # what was planned before is none of the examples'
    before = dict(OPS)
    names: dict[str, Any] = {"torch": torch, "fastcnn": fastcnn}
    examples = doctest.DocTestFinder(recurse=False).find(NAMES[name], name, globs=names)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    try:
        for example in examples:
            runner.run(example, out=said.append)
    finally:
        OPS.clear()  # the example of plan.register, and the planner that has met it
        OPS.update(before)
        fastcnn.plan._planner.cache_clear()
    assert runner.failures == 0, "".join(said)
    assert runner.tries >= 1
