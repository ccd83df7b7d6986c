"""Every op inside what PyTorch offers: compile, export, func, checkpoint, copies, meta, DDP.

The models are those of support/small_models.py, which see each: what is asked of one is asked of
all. What compares with PyTorch's own modules lies with each op.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leave_group import leave_group
from support.operator_arguments import OPERATORS, good_arguments, variants
from support.seeds import seed_all
from support.shapes import LAYOUTS
from support.small_models import SMALL, assert_equal, made, mean_square, results
from support.tolerance import assert_same
from torch import Tensor, distributed
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastcnn import convert
from fastcnn.convert.codegen import fit
from fastcnn.models import CifarResNet

# Dynamo makes an instance of the autograd.Function, against PyTorch's own advice; inductor imports
# parts of torch.jit.
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DIFFERENTIABLE = [name for name, small in SMALL.items() if small.gradient != "none"]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch.compiler.reset()  # dynamo counts the graphs of one forward over all models


def layouts(model: torch.nn.Module, inputs: list[Tensor], layout: str) -> list[Tensor]:
    """Bring both into a layout."""
    model.to(memory_format=LAYOUTS[layout])
    return [
        t.detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_(t.requires_grad)
        for t in inputs
    ]


def dtype_compiled(name: str) -> torch.dtype:
    """The type in which a model is compared with itself compiled, to the bit but in float64.

    upsample_conv2d's convolution that adds is oneDNN's, compiled PyTorch's: other roundings.
    """
    return torch.float64 if name == "upsample_conv2d" else torch.float32


def assert_results(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare to the bit, in float64 as one function that is computed in two ways."""
    exact = expected["y 0"].dtype is not torch.float64
    (assert_equal if exact else assert_same)(found, expected)


# The autograd.Function that backward of a model goes through.
FUNCTIONS = {
    "batch_norm_act": "BatchNormActFunction", "group_norm_act": "GroupNormActFunction",
    "LayerNorm2d": "GroupNormActFunction", "InstanceNormAct2d": "GroupNormActFunction",
    "conv_bn_act": "ConvBnActFunction", "depthwise_conv2d": "DepthwiseConv2dFunction",
    "dropout": "DropoutFunction", "squeeze_excite": "SqueezeExciteFunction",
    "interpolate": "UpsampleFunction", "upsample_conv2d": "UpsampleConv2dFunction",
    "linear_act": "LinearActFunction", "converted": "ConvBnActFunction",
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_models_run_the_ops(name: str) -> None:
    # Else the tests below would ask PyTorch.
    waiting, names = [made(name)(*SMALL[name].inputs()).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name().removesuffix("Backward"))
            waiting += [before for before, _ in node.next_functions]
    assert FUNCTIONS[name] in names


@pytorchs_own_warnings
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("nchw", marks=slow)])
@pytest.mark.parametrize("name", SMALL)
def test_compiled_without_graph_breaks(name: str, layout: str) -> None:
    # aot_eager traces everything and changes no arithmetic: the same bits. The second batch, of
    # another size in one layout, meets what the first has compiled.
    small, dtype = SMALL[name], dtype_compiled(name)
    model, compiled = made(name, dtype), made(name, dtype)
    sizes = (2, 3) if layout == "channels_last" else (2, 2)
    batches = [layouts(model, small.inputs(n, seed, dtype), layout) for seed, n in enumerate(sizes)]
    layouts(compiled, [], layout)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    gradient = name in DIFFERENTIABLE
    assert_results(
        results(run, compiled, *batches, gradient=gradient),
        results(model, model, *batches, gradient=gradient),
    )


@slow
@pytorchs_own_warnings
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SMALL)
def test_compiled_by_inductor(name: str, layout: str) -> None:
    # It compiles what lies between the operators, and so may round otherwise than eager.
    small, gradient = SMALL[name], name in DIFFERENTIABLE
    dtype = torch.float64 if gradient else torch.float32
    model, compiled = made(name, dtype), made(name, dtype)
    batches = [layouts(model, small.inputs(2, seed, dtype), layout) for seed in range(2)]
    layouts(compiled, [], layout)
    run = torch.compile(compiled, fullgraph=True)
    found = results(run, compiled, *batches, gradient=gradient)
    expected = results(model, model, *batches, gradient=gradient)
    if name == "dropout":  # the same masks
        assert all(torch.equal(found[k] == 0, t == 0) for k, t in expected.items())
    assert_results(found, expected)


@pytorchs_own_warnings
@pytest.mark.parametrize(
    ("mode", "training"),
    [(torch.no_grad, True), (torch.inference_mode, False),
     pytest.param(torch.no_grad, False, marks=slow), (torch.enable_grad, True)],
)  # fmt: skip
@pytest.mark.parametrize("name", SMALL)
def test_compiled_without_a_gradient(name: str, mode: Callable[[], Any], training: bool) -> None:
    # There autograd's Functions are left out; weights are folded in evaluation. In training mode,
    # as running statistics are recalibrated; and in grad mode, but with no leaf that requires one.
    # In evaluation in float64: a folded step's activation is a pass of its own when it is compiled.
    dtype = dtype_compiled(name) if training else torch.float64
    model, compiled = (made(name, dtype).train(training).requires_grad_(False) for _ in range(2))
    batches = [SMALL[name].inputs(2, seed, dtype) for seed in range(2)]
    batches = [[t.detach() for t in inputs] for inputs in batches]
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with mode():
        found = results(run, compiled, *batches, gradient=False)
        expected = results(model, model, *batches, gradient=False)
    assert_results(found, expected)


@pytorchs_own_warnings
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_exported(name: str, training: bool) -> None:
    # Any batch size; the running statistics of the exported program move as the module's. In
    # evaluation without gradients, as models are exported.
    # In float64: what leaves this machine has PyTorch's convolutions, which sum in another order.
    small, model = SMALL[name], made(name, torch.float64).train(training)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    first, *batches = [[t.detach() for t in small.inputs(n, n, torch.float64)] for n in (3, 2, 5)]
    sizes = tuple(batch for _ in first)
    with torch.set_grad_enabled(training):
        program = torch.export.export(copy.deepcopy(model), tuple(first), dynamic_shapes=sizes)
        exported = program.module()
        found = results(exported, exported, *batches, gradient=False)
        expected = results(model, model, *batches, gradient=False)
    assert_results(found, expected)
    assert "mkldnn" not in str(program.graph)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_grad(name: str, training: bool) -> None:
    # What backward keeps must be an input or an output there. torch.func.functional_call takes the
    # parameters as arguments; autograd says what is right.
    model, inputs = made(name).train(training), SMALL[name].inputs()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        seed_all(3)
        state = parameters | {name: b.clone() for name, b in buffers.items()}
        return mean_square(torch.func.functional_call(model, state, tuple(inputs)))

    detached = {k: p.detach() for k, p in parameters.items()}
    argnums = tuple(range(1 + len(inputs)))
    found, *dx = torch.func.grad(loss, argnums)(detached, *(t.detach() for t in inputs))
    expected = torch.autograd.grad(loss(parameters, *inputs), [*parameters.values(), *inputs])
    keys = [*parameters, *argnums[1:]]
    for key, a, b in zip(keys, [*found.values(), *dx], expected, strict=True):
        assert torch.equal(a, b), key
    assert not any(m in fit.notes for m in model.modules())  # by the kernels


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    # Forward runs again in backward, with the generator's state put back: the same masks.
    model, again, batch = made(name), made(name), SMALL[name].inputs()
    found = results(lambda *x: checkpoint(again, *x, use_reentrant=reentrant), again, batch)
    expected = results(model, model, batch)
    statistics = dict(model.named_buffers()).keys()
    assert_equal(
        {k: t for k, t in found.items() if k not in statistics},
        {k: t for k, t in expected.items() if k not in statistics},
    )
    assert not any(m in fit.notes for m in again.modules())  # by the kernels


ONCE = (
    r"^\w+ with an output of \[\d+, \d+.*\]: expected to be differentiated once, .* "
    r"fastcnn\.revert\(model\).* torch\.autograd\.detect_anomaly\(\)"
)


@pytest.mark.parametrize("name", [n for n, small in SMALL.items() if small.gradient == "once"])
def test_double_backward_is_refused(name: str) -> None:
    # Rather than a gradient that is silently wrong. A gradient penalty's; behind a sum too, whose
    # dy is a constant.
    for loss in (Tensor.sum, mean_square):
        model, inputs = made(name), SMALL[name].inputs()
        (dx,) = torch.autograd.grad(loss(model(*inputs)), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match=ONCE):
            dx.square().sum().backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", SMALL)
def test_copied_and_pickled(name: str, how: Callable[[Any], Any]) -> None:
    # Before a call and after one, when weights may be kept; nothing is lost, and no data shared.
    model, inputs = made(name).eval(), [SMALL[name].inputs()]
    for _ in range(2):
        again = how(model)
        assert not {t.data_ptr() for t in again.state_dict().values()} & {
            t.data_ptr() for t in model.state_dict().values()
        }
        with torch.no_grad():
            found = results(again, again, *inputs, gradient=False)
            assert_equal(found, results(model, model, *inputs, gradient=False))


@pytest.mark.parametrize("name", SMALL)
def test_meta_tensors_have_shapes_and_no_numbers(name: str) -> None:
    # How large models are planned; autocast does not know the meta device.
    model, inputs = made(name), SMALL[name].inputs()
    y = model(*inputs)
    moved = copy.deepcopy(model).to("meta")
    there = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in inputs]
    planned = moved(*there)
    assert planned.device.type == "meta"
    assert (planned.shape, planned.dtype) == (y.shape, y.dtype)
    if name == "conv2d_int8":  # the others' convolutions are PyTorch's, whose strides differ there
        assert planned.stride() == y.stride()
    if name in DIFFERENTIABLE:
        planned.sum().backward()
        for t in (*moved.parameters(), *there):
            assert t.grad is not None
            assert t.grad.shape == t.shape


def test_ddp_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    # DDP hooks every parameter's gradient accumulation: a Function must feed each exactly once.
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for name in DIFFERENTIABLE:
            model, other, batch = made(name), made(name), SMALL[name].inputs()
            if not list(model.parameters()):
                continue  # which DDP refuses
            found = results(DistributedDataParallel(other), other, batch)
            assert_equal(found, results(model, model, batch))
    finally:
        leave_group()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "channels_last"),
        pytest.param(torch.float32, "nchw", marks=slow),
        pytest.param(torch.bfloat16, "channels_last", marks=slow),
        pytest.param(torch.bfloat16, "nchw", marks=slow),
    ],
    ids=str,
)
# Those of Triton's convolutions: conv2d/test_operators.py.
@pytest.mark.parametrize("op", [op for op in OPERATORS if not op.startswith("conv2d_fused")])
def test_opcheck(op: str, dtype: torch.dtype, layout: str) -> None:
    # Schema, fake tensors and tracing with symbolic sizes agree with the kernels.
    good = good_arguments(op, dtype, layout, w=6)
    for arguments in variants(op, good):
        opcheck(getattr(torch.ops.fastcnn, op), tuple(arguments.values()))


@slow
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
