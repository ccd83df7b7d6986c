"""Subclasses of Tensor, as MONAI's MetaTensor and fastai's TensorImage: __torch_function__ sees a
call of an op as a call of one of torch's functions, and what comes out is the subclass's.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from support import oracles
from support.seeds import seed_all
from support.small_models import SMALL, assert_equal, made, mean_square, results
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastcnn import convert, functional

PRIVATE = {"pixel_norm_act", "instance_norm_act", "upsample_conv2d"}  # called by modules alone
OPS = {name for name in functional.__all__ if name.islower()} - {"pack_conv2d_int8"} | PRIVATE


class Noted(Tensor):
    """Has a note, which goes from a function's first argument that has one to its results."""

    note: str | None = None
    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        cls.calls.append(func.__name__)
        out = super().__torch_function__(func, types, args, kwargs or {})
        notes = [a.note for a in _tensors((*args, *(kwargs or {}).values())) if a.note is not None]
        for t in _tensors((out,)):
            if t.note is None and notes:
                t.note = notes[0]
        return out


def _tensors(values: Any) -> Iterator[Noted]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, Noted):
            yield value


def noted(t: Tensor, note: str = "CT") -> Noted:
    found = t.detach().as_subclass(Noted).requires_grad_(t.requires_grad)
    found.note = note
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_a_subclass_goes_through(name: str, training: bool) -> None:
    # Outputs are the subclass's, with its note; gradients are plain tensors, as PyTorch's are.
    batch, gradient = SMALL[name].inputs(), SMALL[name].gradient != "none"
    plain, model = (made(name).train(training) for _ in range(2))
    leaves = [noted(t) for t in batch]
    seed_all(3)
    y = model(*leaves)
    assert type(y) is Noted
    assert y.note == "CT"
    y = y.as_subclass(Tensor)
    found = {"y 0": y.detach()}
    if gradient:
        Noted.calls.clear()
        mean_square(y).backward()
        assert not set(Noted.calls) & {*OPS, "default"}  # nothing is dispatched in backward
        found |= {f"dx 0, {j}": t.grad for j, t in enumerate(leaves)}
        found |= {f"d{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers())
    assert {type(t) for t in found.values()} == {Tensor}
    assert_equal(found, results(plain, plain, batch, gradient=gradient))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "subclass"])
@pytest.mark.parametrize("name", [n for n, small in SMALL.items() if small.gradient != "none"])
def test_what_comes_out_may_be_written_into(
    name: str, plain: bool, layout: torch.memory_format
) -> None:
    # As every activation in place does. A view that a Function made inside itself refuses it.
    model = made(name).to(memory_format=layout)
    inputs = [t.detach().contiguous(memory_format=layout) for t in SMALL[name].inputs()]
    inputs = [t.requires_grad_() if plain else noted(t.requires_grad_()) for t in inputs]
    y = model(*inputs)
    before = y.detach().clone()
    assert torch.equal(y.mul_(2), before * 2)


def test_each_op_is_one_call() -> None:
    seen = set()
    for name in SMALL:
        Noted.calls.clear()
        made(name)(*map(noted, SMALL[name].inputs()))
        seen |= set(Noted.calls)
        assert "default" not in Noted.calls  # an operator's overload: dispatched within an op
    assert seen >= OPS - {"conv_bn_act"}  # the small models' chains are blocks
    assert made("batch_norm_act")(noted(SMALL["batch_norm_act"].inputs()[0])).note == "CT"


def test_a_subclass_among_the_steps() -> None:
    weight, statistics = noted(torch.randn(4, 4, 1, 1), "weight"), torch.ones(4)
    step = functional.ConvBnActStep(weight, running_mean=statistics, running_var=statistics)
    for y in (
        functional.conv_bn_act(torch.randn(2, 4, 3, 3), [step]),
        functional.conv_bn_act(torch.randn(2, 4, 3, 3), [step._replace(weight=weight)], [step]),
        functional.conv_bn_act_blocks(
            torch.randn(2, 4, 3, 3), [functional.ConvBnActBlock([step], ())]
        ),
    ):
        assert isinstance(y, Noted)
        assert y.note == "weight"


def test_modes_see_calls_too() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list[Any] = []
    with Mode():
        functional.group_norm_act(torch.ones(2, 4, 3, 3), 2)
    assert functional.group_norm_act in calls
    assert not [f for f in calls if f is not torch.ones and f is not functional.group_norm_act]


def test_a_type_that_refuses() -> None:
    class Refuses(Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any) -> Any:
            return NotImplemented

    x = torch.ones(2, 4, 3, 3).as_subclass(Refuses)
    with pytest.raises(TypeError, match=r"fastcnn\.functional\.group_norm_act.*Refuses"):
        functional.group_norm_act(x, 2)


def activations_in_place() -> nn.Module:
    conv, norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
    act = nn.LeakyReLU(0.2, inplace=True)  # a slope that no kernel has
    return nn.Sequential(
        conv, norm, act, nn.GroupNorm(2, 4), nn.LeakyReLU(0.2, inplace=True),
        nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2), nn.LeakyReLU(0.2, inplace=True),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_converted_with_activations_in_place(mode: Any, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = activations_in_place().double().to(memory_format=layout)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
    found = []
    for convert_it in (False, True):
        if convert_it:
            convert(model, mode=mode)
        model.zero_grad()
        y = model(noted(x))
        assert type(y) is Noted
        assert y.note == "CT"
        y.sum().backward()
        found.append([y.detach().as_subclass(Tensor), *(p.grad for p in model.parameters())])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_monai_s_unet_of_its_own_tensors(mode: Any) -> None:
    # Its activations work in place, behind instance norms; the default of its data pipelines.
    torch.manual_seed(0)
    features = (4, 4, 4, 4, 4, 4)
    model = oracles.monai.networks.nets.BasicUNet(2, 1, 2, features=features).double()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    found = []
    for convert_it in (False, True):
        if convert_it:
            convert(model, mode=mode)
        model.zero_grad()
        y = model(oracles.monai.data.MetaTensor(x, meta={"filename_or_obj": "a.nii"}))
        assert type(y) is oracles.monai.data.MetaTensor
        assert y.meta["filename_or_obj"] == "a.nii"
        y.sum().backward()
        found.append([y.detach().as_tensor(), *(p.grad for p in model.parameters())])
    assert_same(found[1], found[0])
