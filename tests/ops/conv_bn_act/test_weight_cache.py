"""FoldedConv2d keeps weights while nothing changes, and no longer."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.conv2d_folded_cases import Pair, kept, operators, pair
from support.roundings import Expected
from support.seeds import seeded
from support.shapes import LAYOUTS
from torch import nn
from torch.nn.utils import parametrizations

from fastcnn._C import Snapshot
from fastcnn.ops.conv2d.onednn import folds
from fastcnn.ops.conv_bn_act import folded as conv2d_folded, inference_candidates

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)


def changes() -> dict[str, Callable[[Pair], object]]:
    def step(model: Pair) -> None:
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.enable_grad():
            model.plain(torch.randn(2, 4, 9, 8)).sum().backward()
        optimizer.step()

    def load(model: Pair, assign: bool) -> None:
        other = {k: 1.5 * v for k, v in model.state_dict().items()}
        model.load_state_dict(other, assign=assign)

    def there_and_back(model: Pair) -> None:
        model.to(torch.bfloat16).to(torch.float32)  # rounded, perhaps at the old address

    return {
        "weight": lambda m: m.conv.weight.mul_(1.5),
        "bias": lambda m: m.conv.bias.add_(1),
        "mean": lambda m: m.norm.running_mean.add_(1),
        "var": lambda m: m.norm.running_var.mul_(2),
        "gamma": lambda m: m.norm.weight.mul_(2),
        "beta": lambda m: m.norm.bias.add_(1),
        "eps": lambda m: setattr(m.norm, "eps", 0.5),
        "optimizer": step,
        "load_state_dict": lambda m: load(m, False),
        "assigned": lambda m: load(m, True),
        ".data": lambda m: setattr(m.conv.weight, "data", 2 * m.conv.weight.data),
        ".to": there_and_back,
        "another module's": lambda m: setattr(
            m.conv, "weight", nn.Parameter(2 * m.conv.weight.detach())
        ),
        "parametrized": lambda m: parametrizations.weight_norm(m.conv),
        "stride": lambda m: setattr(m.conv, "stride", (2, 2)),
    }


@pytest.mark.parametrize("name", changes())
def test_changes_are_noticed(name: str) -> None:
    for layout, mode in itertools.product(LAYOUTS.values(), (torch.no_grad, torch.inference_mode)):
        model = pair()
        x = torch.randn(2, 4, 9, 8).contiguous(memory_format=layout)
        with mode():
            before = model(x)
        with torch.no_grad():
            changes()[name](model)
        with mode():
            after = model(x)
            # weight_norm's weight is the same number by number.
            assert name == "parametrized" or not torch.equal(after, before)
            assert torch.equal(after, model.step(x))


def vectors(model: Pair) -> list[torch.Tensor]:
    norm = model.norm
    return [model.conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]


@pytest.mark.parametrize("how", [".data", "NumPy"])
def test_edits_of_one_channel_or_filter_are_seen_at_once_without_a_counter(how: str) -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        for channel, t in itertools.product(range(6), [model.conv.weight, *vectors(model)]):
            before = model(x)
            if how == ".data":
                t.data[channel] += 1.5
            else:
                t.detach().numpy()[channel] += 1.5
            assert kept(lambda: model.folded(x)) is False
            assert torch.equal(model(x), model.step(x))
            assert not torch.equal(model(x), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edits_of_one_weight_are_seen_after_as_many_calls_as_a_filter_has(layout: str) -> None:
    model = pair().to(memory_format=LAYOUTS[layout])
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=LAYOUTS[layout])  # else it is copied
    with torch.no_grad():
        for place in range(model.conv.weight[0].numel()):
            model(x)
            at = (place % 6, *np.unravel_index(place, model.conv.weight.shape[1:]))
            model.conv.weight.data[at] += 1.5
            assert sum(not kept(lambda: model(x)) for _ in range(36)) == 1
            assert torch.equal(model(x), model.step(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_and_not_a_number_are_seen(dtype: torch.dtype) -> None:
    model, x = pair().to(dtype), torch.randn(2, 4, 9, 8, dtype=dtype)
    if not folds(x):
        pytest.skip("oneDNN has no bfloat16 on this processor")
    nan, zero = torch.tensor([float("nan"), 0.0], dtype=dtype)
    with torch.no_grad():
        model(x)
        for value, is_kept in ((zero, False), (-zero, False), (nan, False), (nan, True)):
            for t in (model.conv.weight, model.norm.bias):
                t.data[3] = value
                assert kept(lambda: model(x)) == is_kept


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_a_change_of_every_sign_is_seen_at_once(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 35, generator=seeded(0)).mul(9).to(dtype)
    snapshot = Snapshot([], weight.data_ptr(), *weight.shape, weight.element_size())
    assert snapshot.is_current()
    weight.neg_()
    assert not snapshot.is_current()


def test_memory_that_has_moved_is_noticed() -> None:
    # Large, so that what held the old values goes back to the system, and a read of it is a signal.
    model, x = pair(512, 1024), torch.randn(1, 512, 2, 2)
    with torch.no_grad():
        before = model(x)
        model.share_memory()  # as a queue, Process(args=...) and a DataLoader that spawns do
        assert not kept(lambda: model(x))
        assert torch.equal(model(x), before)
        assert kept(lambda: model(x))
        # Another process writes into it.
        model.norm.running_mean.data.add_(1)
        assert torch.equal(model(x), model.step(x))


def test_storage_that_was_freed_is_refused() -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        before = model(x)
        storage = model.conv.weight.untyped_storage()
        values = model.conv.weight.detach().clone()
        storage.resize_(0)
        with pytest.raises(ValueError, match="conv_bn_act: weight: expected a storage of at least"):
            model(x)
        storage.resize_(values.nbytes)
        model.conv.weight.data.copy_(values)
        assert torch.equal(model(x), before)


def test_other_sizes_and_strides_of_the_same_memory_are_noticed() -> None:
    model, x = pair(6, 6, kernel_size=1, padding=0), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        before = model(x)
        model.conv.weight.data = model.conv.weight.data.transpose(0, 1)
        assert torch.equal(model(x), model.step(x))
        assert not torch.equal(model(x), before)


def test_what_is_not_dense_is_folded_at_every_call() -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8)
    model.norm.weight = nn.Parameter(torch.ones(12)[::2], requires_grad=False)
    with torch.no_grad():
        for _ in range(2):
            assert not kept(lambda: model(x))
            model.norm.weight.data[4] += 1
            assert torch.equal(model(x), model.step(x))


def test_tensors_of_inference_mode_are_folded_at_every_call() -> None:
    with torch.inference_mode():
        model, x = pair(), torch.randn(2, 4, 9, 8)
        before = model(x)
        assert not kept(lambda: model(x))
        model.conv.weight.mul_(1.5)
        assert not torch.equal(model(x), before)
        assert torch.equal(model(x), model.step(x))


def test_cuda_s_folded_plan_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, by the fallback of cuDNN's operator there.
    monkeypatch.setattr(conv2d_folded, "is_planned", lambda x: True)
    monkeypatch.setattr(inference_candidates, "choose", lambda problem: "cudnn_fused")
    model, x = pair(), torch.randn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        residual = torch.randn_like(model(x))
        for _ in range(2):
            y, exact = model(x, residual), copy.deepcopy(model).double()
            expected = Expected(
                lambda m=exact: {"y": m.plain(x.double(), residual.double())},
                torch.float32,
                autocast=True,  # weights are rounded after they are folded
            )
            expected.check({"y": y})
            names = operators(lambda: model(x, residual))
            assert not any("rsqrt" in name for name in names)
            model.norm.weight.mul_(2)
