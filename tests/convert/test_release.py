"""`del model` frees a converted model at once, as PyTorch does: without the garbage collector."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.conversion_cases import Branch, cbr
from support.oracles import torchvision
from torch import nn

from fastcnn import convert, report, revert, verify


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a chain": lambda: nn.Sequential(cbr(nn.ReLU())),
    "a forward that does not trace": lambda: nn.Sequential(Branch(body=cbr(nn.ReLU()))),
    "a layer": lambda: nn.BatchNorm2d(4),
    "a network": lambda: torchvision.models.resnet18(),
}
X = torch.randn(2, 4, 32, 32)


def _tied(model: Any) -> None:
    """Into cycles, as hooks of a model's own methods and trainers do."""
    _called(model)
    model.__dict__["trainer"] = {"model": model}
    model.register_forward_hook(functools.partial(print, model))


def _called(model: Any) -> None:
    with torch.no_grad():
        model.eval()(_input(model))


def _trained(model: Any) -> None:
    model.train()(_input(model)).sum().backward()


def _verified(model: Any) -> None:
    _trained(model)
    verify(model, _input(model))


def _input(model: nn.Module) -> torch.Tensor:
    return X[:, : next(model.parameters()).shape[1]] if model._modules else X


USES = [_called, _trained, _verified, report, revert, copy.deepcopy, repr]


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_a_cycle_is_collected(name: str, mode: Any) -> None:
    model = MODELS[name]()
    weights = [weakref.ref(p) for p in model.parameters()]
    _tied(convert(model, mode=mode))
    del model
    gc.collect()
    assert not any(ref() is not None for ref in weights)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", MODELS)
def test_all_is_freed_with_the_model(name: str, mode: Any, use: Callable[[Any], Any]) -> None:
    model = MODELS[name]()
    weights = [weakref.ref(p) for p in model.parameters()]
    modules = [weakref.ref(m) for m in model.modules()]
    use(convert(model, mode=mode))
    del model
    assert not any(ref() is not None for ref in (*weights, *modules))
