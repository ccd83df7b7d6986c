"""Blocks and memory levels of conv_bn_act inside what PyTorch offers."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.chains import Stage, stage
from support.leave_group import leave_group
from torch import Tensor, distributed
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from fastcnn import convert, models

LEVELS = ["default", "low", "lowest"]


def bottlenecks(memory: str) -> Stage:
    return stage("projection", "identity", "two steps", memory=memory)


def small_resnet(memory: str) -> models.ResNet:
    """Bottlenecks, one and then two in a stage, with every projection."""
    model = models.ResNet(models.Bottleneck, [1, 2, 1, 1], num_classes=3)
    return convert(model, memory=memory)


@pytest.mark.parametrize("memory", LEVELS)
def test_func_grad(memory: str) -> None:
    # What backward keeps must be an input or an output there. Autograd says what is right.
    model = bottlenecks(memory)
    x = torch.randn(2, 4, 9, 8)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        state = parameters | {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(model, state, (x,)).square().mean()

    actual = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, e in zip(parameters, expected, strict=True):
        assert torch.equal(actual[name], e), name


@pytest.mark.parametrize("memory", LEVELS)
def test_activation_checkpointing(memory: str) -> None:
    model = bottlenecks(memory)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    y = checkpoint(model, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", LEVELS)
def test_gradcheck(memory: str) -> None:
    # By differences of the forward itself. A smooth activation: its derivative does not jump.
    model = stage("projection", "identity", act="silu", memory=memory).double()
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = [model.convs[i].weight for i in (0, 1, 6)]
    assert gradcheck(lambda x, *_: model(x), (x, *weights), fast_mode=True)


def test_double_backward_is_refused() -> None:
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    for memory in LEVELS:
        (dx,) = torch.autograd.grad(bottlenecks(memory)(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("memory", LEVELS)
def test_export(memory: str) -> None:
    # Any batch size, trained and evaluated; running statistics move as the module's.
    for training in (True, False):
        model = bottlenecks(memory).train(training)
        x = torch.randn(2, 4, 9, 8)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: batch},))
        exported = program.module()
        for n in (2, 5):
            x = torch.randn(n, 4, 9, 8)
            assert torch.equal(exported(x), model(x))
        buffers = dict(exported.named_buffers())
        for name, expected in model.named_buffers():
            assert torch.equal(buffers[name], expected), name


@pytest.mark.parametrize("memory", LEVELS)
def test_models_are_pickled_and_copied_with_their_level(memory: str) -> None:
    model = small_resnet(memory)
    x = torch.randn(2, 3, 33, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for part in (other, other.layer2[0]):
            assert part._fastcnn_conversion.options.memory == memory
        assert torch.equal(other(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("memory", LEVELS)
def test_meta_tensors(memory: str) -> None:
    # How large models are planned: gradients have their sizes.
    with torch.device("meta"):
        model = small_resnet(memory)
        model(torch.empty(2, 3, 33, 32)).sum().backward()
    for p in model.parameters():
        assert p.grad.shape == p.shape


@pytest.mark.parametrize("memory", LEVELS)
def test_autocast_is_a_cast_of_images_and_weights(memory: str) -> None:
    # To the bit what explicit casts give, with gradients in float32.
    model = bottlenecks(memory)
    cast = copy.deepcopy(model)
    for conv in cast.convs:
        conv.bfloat16()
    x = torch.randn(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    other = cast(x.bfloat16())
    assert torch.equal(y, other)
    for t in (y, other):
        t.sum().backward()
    for (name, p), q in zip(model.named_parameters(), cast.parameters(), strict=True):
        assert p.grad.dtype is torch.float32
        assert torch.equal(p.grad, q.grad.float()), name


def test_ddp_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    # One Function feeds the parameters of several blocks, each exactly once.
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for memory in LEVELS:
            plain = small_resnet(memory)
            wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
            x = torch.randn(2, 3, 33, 32)
            for model in (plain, wrapped):
                model(x).square().sum().backward()
            for one, many in zip(plain.parameters(), wrapped.parameters(), strict=True):
                assert torch.equal(many.grad, one.grad)
    finally:
        leave_group()
