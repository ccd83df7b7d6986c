"""convert(mode="infer"): folded weights, kept between calls, of every idiom."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import CASES, Decoder, bn, cbr, conv, net
from support.conversions import assert_inferred, assert_infers, images, patterns, prepared
from support.oracles import torchvision
from torch import Tensor, nn

from fastcnn import convert, revert
from fastcnn.convert.codegen.folded import FoldedChain
from fastcnn.convert.options import Options

LAST = torch.channels_last

# Without any weight there is nothing to fold, and nothing to halve in assert_infers.
WITHOUT = ("frozen batch norm", "instance norm with statistics")
WITH_WEIGHTS = [name for name in CASES if name not in WITHOUT]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_idioms(name: str) -> None:
    make, expected = CASES[name]
    found = assert_infers(make(), images(3, 4, 6, 8))
    # What is found for training is found here; and convolutions without a batch norm.
    assert sum("conv-bn" in words for words in found) == sum("conv-bn" in w for w in expected)


def test_convolutions_without_batch_norm_are_steps() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(), bn(), nn.ReLU(), conv())
    assert assert_infers(model, images(2, 4, 8, 8)) == ["conv-relu-pool > conv-bn-relu > conv"]
    model = net(lambda m, x: F.relu(m.conv(x) + m.conv2(x)))
    assert assert_infers(model, images(2, 4, 8, 8)) == ["conv + projection - relu"]


@pytest.mark.parametrize("last", [False, True, None])
def test_a_chain_on_an_upsampled_image(last: Any) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Decoder(None, last)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(
                x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last),
                x[:, :4].contiguous(memory_format=torch.channels_last),
            )

    first = "interpolate" if last is None else "interpolate-cat"
    found = assert_infers(Beside(), images(2, 32, 8, 6))
    assert found == [f"{first} > conv-bn-relu > conv-bn-relu"]


def test_frozen_batch_norm_in_a_model_that_trains() -> None:
    model = nn.Sequential(conv(), torchvision.ops.FrozenBatchNorm2d(4), nn.ReLU())
    prepared(model).float()
    exact, x = copy.deepcopy(model).double(), images(2, 4, 6, 6).float()
    convert(model, mode="infer")
    with torch.no_grad():
        assert_inferred(model(x), exact, x)


def test_a_residual_that_somebody_reads_is_left_as_it_is() -> None:
    """The sum may be written into a dying residual's memory, and into no other."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.relu(m.bn(m.conv(x)))
        z = m.relu(m.bn2(m.conv2(m.third(y))) + y)
        return z, y

    def dying(m: Any, x: Tensor) -> Any:
        return run(m, x)[0]

    for forward in (run, dying):
        model = prepared(net(forward, third=nn.Sequential(conv(), bn(), nn.ReLU()))).float().eval()
        exact = copy.deepcopy(model).double()
        convert(model, mode="infer")
        x = images(2, 4, 16, 16).float().to(memory_format=torch.channels_last)
        before = x.clone()
        with torch.no_grad():
            for _ in range(2):
                assert_inferred(model(x), exact, x)
        assert torch.equal(x, before)


def test_images_that_are_the_residual_are_not_written() -> None:
    model = prepared(net(lambda m, x: m.relu(m.bn2(m.conv2(m.relu(m.bn(m.conv(x))))) + x)))
    convert(model.float().eval(), mode="infer")
    x = images(2, 4, 16, 16).float().to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        model(x)
    assert torch.equal(x, before)


def test_one_training_step_changes_what_is_inferred() -> None:
    model = prepared(nn.Sequential(cbr(nn.ReLU()), cbr())).float()
    convert(model, mode="infer")
    x = images(4, 4, 6, 6).float()
    with torch.no_grad():
        before = model.eval()(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = model.eval()(x)
    assert_inferred(after, revert(model).double(), x)
    assert not torch.equal(before, after)


def test_autocast_in_bfloat16() -> None:
    model = prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))).float().eval()
    eager, x = copy.deepcopy(model), images(2, 4, 8, 8).float()
    convert(model, mode="infer")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, want = model(x), eager(x)
    assert y.dtype is want.dtype is torch.bfloat16
    assert_inferred(y, eager.double(), x, torch.bfloat16)
    assert patterns(model) == ["conv-bn-relu > conv-bn-relu"]


def test_a_shared_model_runs_on() -> None:
    # What torch.multiprocessing's queues and processes do to a model that they are given.
    model = nn.Sequential(nn.Conv2d(512, 1024, 1), bn(1024), nn.ReLU()).eval()
    x = torch.randn(1, 512, 4, 4)
    convert(model, mode="infer")
    with torch.no_grad():
        before = model(x)
        model.share_memory()
        assert torch.equal(model(x), before)


def test_pruning_and_recalibration_without_a_counter_are_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), bn(32), nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    edits: list[Any] = [
        lambda: model[0].weight.data[5].zero_(),
        lambda: model[0].weight.detach().numpy().__imul__(0.5),
        lambda: model[1].running_mean.data[3].add_(5),
        lambda: model[1].running_var.numpy().__setitem__(7, 2.0),
    ]
    convert(model, mode="infer")
    with torch.no_grad():
        for edit in edits:
            before = model(x)
            edit()
            y, anew = model(x), convert(revert(copy.deepcopy(model)), mode="infer")(x)
            assert torch.equal(y, anew)
            assert not torch.equal(y, before)


class Upsampled(nn.Module):
    """A Decoder on an image and a skip that are parts of one."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Decoder(nn.Upsample(scale_factor=2), True)

    def forward(self, x: Tensor) -> Tensor:
        skip = x[:, :4].contiguous(memory_format=LAST)
        y: Tensor = self.part(x[:, :, ::2, ::2].contiguous(memory_format=LAST), skip)
        return y


def projection() -> nn.Module:
    return net(lambda m, x: F.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))))


# A model, the channels of its images, and where the parameters of two of its steps are.
CHAINS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, str]]] = {
    "chain": (lambda: nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU())), 4, ("0", "1")),
    "projection": (projection, 4, ("conv", "bn")),
    "upsampled": (Upsampled, 32, ("part.first", "part.body")),
    "no batch norm": (lambda: nn.Sequential(conv(), nn.ReLU(), conv()), 4, ("0", "2")),
}
TRAINS: dict[str, Callable[[str, tuple[str, str]], bool]] = {
    "all": lambda name, steps: True,
    "first frozen": lambda name, steps: not name.startswith(steps[0]),
    "first alone": lambda name, steps: name.startswith(steps[0]),
    "biases": lambda name, steps: name.endswith("bias"),
}


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_after_a_call_without(name: str, trains: str) -> None:
    make, c, steps = CHAINS[name]
    given = prepared(make()).float().eval().to(memory_format=LAST)
    model = convert(copy.deepcopy(given), mode="infer")
    x = images(2, c, 8, 6).float().to(memory_format=LAST)
    for grads in (False, True):  # a call under no_grad; one of a model of which nothing trains
        model.requires_grad_(not grads)
        with torch.set_grad_enabled(grads):
            assert not model(x).requires_grad
            assert not model(x).requires_grad
        anew = convert(copy.deepcopy(given), mode="infer")
        for m in (model, anew):
            for parameter, p in m.named_parameters():
                p.requires_grad_(TRAINS[trains](parameter, steps))
                p.grad = None
            m(x).square().sum().backward()
        for p, expected in zip(model.parameters(), anew.parameters(), strict=True):
            assert (p.grad is not None) == p.requires_grad
            assert p.grad is None or torch.equal(p.grad, expected.grad)


def folded_chain(model: Any) -> FoldedChain:
    steps = [(c, norm, "relu", None) for c, norm, _ in model]
    return FoldedChain(steps, None, False, Options(mode="infer"))


def test_refresh_reaches_kept_chains() -> None:
    model: Any = prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))).float().eval()
    chain, x = folded_chain(model), images(2, 4, 8, 8).float().to(memory_format=LAST)
    with torch.no_grad():
        chain(x, None)
        states = [step._state for step, _ in chain._main]
        chain(x, None)
        assert [step._state for step, _ in chain._main] == states
        chain._main[1][0].refresh()
        chain(x, None)
        assert chain._main[0][0]._state is states[0]
        assert chain._main[1][0]._state not in (None, states[1])


def test_what_is_kept_goes_with_the_type() -> None:
    model: Any = prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))).float().eval()
    chain = folded_chain(model)
    with torch.no_grad():
        for n in (1, 2, 3):
            chain(images(n, 4, 8, 8).float().to(memory_format=LAST), None)
        assert len(chain._known) == 3
        states: list[Any] = [weakref.ref(step._state) for step, _ in chain._main]
        model.bfloat16()
        chain(images(1, 4, 8, 8).bfloat16().to(memory_format=LAST), None)
    assert len(chain._known) <= 1  # none where oneDNN has no bfloat16
    assert [state() for state in states] == [None, None]
