"""The ops inside what PyTorch offers: compile, export, func, checkpoint."""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.activations import ACTS, near_a_kink
from support.leave_group import leave_group
from support.seeds import seed_all, seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, distributed, nn
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastcnn import convert, functional
from fastcnn.functional import ConvBnActStep
from fastcnn.models import CifarResNet, resnet20
from fastcnn.nn import (
    BatchNormAct2d,
    GroupNormAct,
    InstanceNormAct2d,
    LayerNorm2d,
    conv_bn_act,
)

# Dynamo makes an instance of the autograd.Function, against PyTorch's own advice; inductor imports
# parts of torch.jit.
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Network(nn.Module):
    """All functions, trained and frozen statistics, and tensors that come in twice: the input that
    is the residual too, a step that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = BatchNormAct2d(6, act="relu6")
        self.conv, self.conv_bn = nn.Conv2d(6, 6, 3, padding=1, bias=False), BatchNormAct2d(6)
        self.norms = nn.Sequential(
            GroupNormAct(2, 6, act="silu"),
            LayerNorm2d(6),
            InstanceNormAct2d(6, affine=True, track_running_stats=True, act="gelu"),
        )
        self.last = BatchNormAct2d(6, act="none").eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.first(x))
        x = conv_bn_act(x, [(self.conv, self.conv_bn)] * 2, residual=x)
        x = self.norms(x)
        return self.last(x, x)


def steps_of_training(run: Callable[[Tensor], Tensor], network: Network) -> list[Tensor]:
    """Outputs and gradients of two batches (the second meets what the first compiled), buffers."""
    found = []
    for i in range(2):
        x = torch.randn(2, 3, 8, 9, generator=seeded(i)).to(network.first.weight).requires_grad_()
        y = run(x)
        y.square().mean().backward()
        found += [y.detach(), x.grad]
    return found + [p.grad for p in network.parameters()] + list(network.buffers())


@pytorchs_own_warnings
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("nchw", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(layout: str) -> None:
    # aot_eager traces everything and changes no arithmetic: the same bits.
    network = Network().to(memory_format=LAYOUTS[layout])
    compiled = copy.deepcopy(network)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        steps_of_training(run, compiled), steps_of_training(network, network), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytorchs_own_warnings
def test_compile_with_inductor() -> None:
    # It compiles what lies between the operators, and so may round otherwise than eager.
    network = Network().double()
    compiled = copy.deepcopy(network)
    run = torch.compile(compiled, fullgraph=True)
    assert_same(steps_of_training(run, compiled), steps_of_training(network, network))


@pytorchs_own_warnings
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export(training: bool) -> None:
    # Any batch size; the running statistics of the exported program move as the module's.
    network = Network().train(training)
    x = torch.randn(2, 3, 8, 9)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(copy.deepcopy(network), (x,), dynamic_shapes=({0: batch},))
    exported = program.module()
    for n in (2, 5):
        x = torch.randn(n, 3, 8, 9)
        assert torch.equal(exported(x), network(x))
    buffers = dict(exported.named_buffers())
    for name, expected in network.named_buffers():
        assert torch.equal(buffers[name], expected), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_func_grad(training: bool) -> None:
    # torch.func.functional_call takes the parameters as arguments; autograd says what is right.
    network = Network().train(training)
    x = torch.randn(2, 3, 8, 9)
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        state = parameters | {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(network, state, (x,)).square().mean()

    actual = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, e in zip(parameters, expected, strict=True):
        assert torch.equal(actual[name], e), name


def test_activation_checkpointing() -> None:
    # Forward runs again in backward: the same gradients. (Running statistics move twice, as
    # PyTorch's do.)
    network = Network()
    x = torch.randn(2, 3, 8, 9)
    for run in (network, lambda x: checkpoint(network, x, use_reentrant=False)):
        network.zero_grad()
        run(x).square().mean().backward()
        grads = [p.grad for p in network.parameters()]
        if run is network:
            expected = grads
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_double_backward_is_refused() -> None:
    # Rather than a gradient that is silently wrong: a gradient penalty's, behind a sum too, whose
    # dy is a constant.
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    step = ConvBnActStep(torch.randn(3, 3, 1, 1), training=True)
    for run in (
        lambda: functional.batch_norm_act(x, None, None, training=True),
        lambda: functional.batch_norm_act(x, torch.zeros(3), torch.ones(3), act="silu"),
        lambda: functional.conv_bn_act(x, [step]),
        lambda: functional.group_norm_act(x, 3),
        lambda: LayerNorm2d(3)(x),
    ):
        for loss in (torch.Tensor.sum, lambda y: y.square().sum()):
            (dx,) = torch.autograd.grad(loss(run()), x, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                dx.square().sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_act_gradcheck(layout: str, training: bool) -> None:
    # Against differences of the forward itself, by all inputs at once.
    weight, bias = torch.tensor([[3.0, -2.5], [0.5, 1.0]], dtype=torch.float64)
    mean, var = torch.tensor([[0.1, -0.2], [0.8, 1.5]], dtype=torch.float64)
    stats = (None, None) if training else (mean, var)

    def run(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor, act: str) -> Tensor:
        added = residual[0] if residual else None
        return functional.batch_norm_act(x, *stats, weight, bias, training, residual=added, act=act)

    for act, residual in itertools.product(ACTS, [False, True]):
        near = torch.tensor(True)
        while near.any():  # gradcheck's steps of 1e-6 must not cross a kink
            images = torch.randn(1 + residual, 3, 2, 3, 2, dtype=torch.float64).unbind()
            images = [t.contiguous(memory_format=LAYOUTS[layout]) for t in images]
            leaves = [images[0], weight, bias, *images[1:]]
            z = run(*leaves, act="none")
            near = near_a_kink(z, act, 1e-3)
        leaves = [t.clone().requires_grad_() for t in leaves]
        assert gradcheck(lambda *t, a=act: run(*t, act=a), leaves)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_bn_act_gradcheck(layout: str, training: bool) -> None:
    # Two steps: the first one's activation is recomputed in backward.
    def image(*sizes: int) -> Tensor:
        t = torch.randn(sizes, dtype=torch.float64)
        return t.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def vector() -> Tensor:
        return torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()

    stats = (None, None) if training else (torch.zeros(2), torch.ones(2))
    mean, var = (None if t is None else t.double() for t in stats)

    def steps(w1: Tensor, w2: Tensor, b: Tensor, *norm: Tensor) -> list[ConvBnActStep]:
        return [
            ConvBnActStep(w1, b, 1, 1, 1, 1, mean, var, *norm[:2], training, act="relu6"),
            ConvBnActStep(w2, None, 1, 0, 1, 2, mean, var, *norm[2:], training, act="relu"),
        ]

    def run(x: Tensor, r: Tensor, *parameters: Tensor) -> Tensor:
        return functional.conv_bn_act(x, steps(*parameters), r)

    near = torch.tensor(True)
    while near.any():  # gradcheck's steps of 1e-6 must not cross a non-differentiable point
        leaves = [image(2, 2, 4, 3), image(2, 2, 4, 3), image(2, 2, 3, 3), image(2, 1, 1, 1)]
        leaves += [vector() for _ in range(5)]
        x, r, *parameters = leaves
        first, second = steps(*parameters)
        z1 = functional.conv_bn_act(x, [first._replace(act="none")])
        z2 = functional.conv_bn_act(x, [first, second._replace(act="none")], r)
        near = torch.cat([near_a_kink(z1, "relu6", 1e-3), near_a_kink(z2, "relu", 1e-3)])

    # In training the convolution's bias has gradient 0, which differences meet to 1e-7.
    assert gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "nchw"),
        (torch.bfloat16, "channels_last"),
        pytest.param(torch.float32, "channels_last", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "nchw", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    # Schema, fake tensors and tracing with symbolic sizes agree with the kernels.
    x, r, dy = (
        torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(3)
    )
    ops, (a, b, mean, var) = torch.ops.fastcnn, torch.rand(4, 3).add(0.5)
    for residual, weight, bias in ((None, None, None), (r, a, b)):
        opcheck(ops.batch_norm_act_fwd, (x, residual, weight, bias, 1e-5, 1))
        opcheck(ops.batch_norm_act_apply, (x, residual, weight, bias, mean, var, 1e-5, 2))
        for want in (False, True):
            args = (dy, x, residual, weight, bias, mean, var, 1e-5, 1, True, want)
            opcheck(ops.batch_norm_act_bwd, args)
            opcheck(ops.batch_norm_act_reduce, (*args[:-2], want))
        sums = (mean, var, torch.tensor([60.0]))
        opcheck(ops.batch_norm_act_dx, (*args[:7], *sums, 1e-5, 1, True))
    opcheck(ops.batch_norm_act_stats, (x,))
    opcheck(ops.batch_norm_join_stats, (torch.rand(2, 7),))
    for total in (None, torch.tensor([60.0])):
        running = a.to(dtype), b.to(dtype)
        opcheck(ops.batch_norm_update_running, (*running, mean, var, total, 0.1, 9))
    for weight, bias in ((None, None), (a, b)):
        opcheck(ops.group_norm_act_fwd, (x, weight, bias, 3, 1e-5, 1))
        opcheck(ops.pixel_norm_act_fwd, (x, weight, bias, 1e-5, 1))
        for name, count in (("group", 3), ("pixel", 4 * 5)):
            bwd = getattr(ops, f"{name}_norm_act_bwd")
            stats = torch.rand(2, 2, count).add(0.5).unbind()
            opcheck(bwd, (dy, x, weight, bias, *stats, 1e-5, 1))


def test_models_are_pickled_and_copied() -> None:
    # Chains hold a function on the class: neither copy may lose it or share parameters.
    seed_all(0)
    model = resnet20().eval()
    x = torch.randn(2, 3, 8, 8)
    for original in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(original(x), model(x))
        assert original.conv1.weight.data_ptr() != model.conv1.weight.data_ptr()


@pytest.mark.slow
@pytorchs_own_warnings
def test_a_whole_network_compiles_to_one_graph() -> None:
    # Identity blocks pass one tensor as input and residual, strided ones a padded view.
    eager, compiled = (convert(CifarResNet(8)) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    eager(x).square().sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.equal(other.grad, one.grad), name  # aot_eager runs the very same operators


def test_meta_tensors_have_shapes_and_no_numbers() -> None:
    # How large models are planned; autocast does not know the meta device.
    with torch.device("meta"):
        model = resnet20()
        logits = model(torch.empty(4, 3, 32, 32))
    assert logits.device.type == "meta"
    assert logits.shape == (4, 10)
    torch.autograd.backward(logits.sum())
    assert model.conv1.weight.grad.shape == model.conv1.weight.shape


def test_ddp_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    # DDP hooks every parameter's gradient accumulation: a Function must feed each exactly once.
    seed_all(0)
    plain = resnet20()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        x = torch.randn(4, 3, 8, 8)
        for model in (plain, wrapped):
            model(x).square().sum().backward()
        pairs = zip(plain.parameters(), wrapped.module.parameters(), strict=True)
        for one, many in pairs:
            assert torch.equal(many.grad, one.grad)
    finally:
        leave_group()
