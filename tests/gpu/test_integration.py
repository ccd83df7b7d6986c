"""A converted network inside what PyTorch offers: on a GPU, or on the CPU as on one."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from support.gpu_networks import (
    assert_bitwise,
    batch,
    expected_logits,
    expected_results,
    networks,
    results,
)
from support.seeds import seed_all
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcnn import convert

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is float32, and cuDNN's weight gradients are the same from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_training_step_is_as_exact_as_its_arithmetic() -> None:
    fused, plain = networks()
    x, target = batch()
    expected_results(plain, x, target).check(results(fused, x, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    # Shows a cast that is missing or too many: statistics or sums in the half type, an activation
    # that is rounded twice.
    fused, plain = networks()
    x, target = batch()
    expected = expected_results(plain, x, target, dtype)
    with torch.autocast(DEVICE.type, dtype):
        found, eager = (results(model, x, target) for model in (fused, plain))
    assert all(found[k].dtype is eager[k].dtype for k in eager)
    expected.check(found)


def test_gradient_scaling() -> None:
    # float16 with the usual scale: sums of scaled gradients in float16 would overflow, and the step
    # be left out.
    model, plain = networks()
    x, target = batch()
    expected = expected_results(plain, x, target, torch.float16)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(DEVICE.type, torch.float16):
        logits = model(x)
        loss = F.cross_entropy(logits, target)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {"logits": logits.detach()}
    found |= {f"d{name}": p.grad.clone() for name, p in model.named_parameters()}
    found |= {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    expected.check(found)
    before = model.conv1.weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    assert not torch.equal(model.conv1.weight, before)


def test_an_overflow_is_seen_by_the_scaler() -> None:
    # 2^40 overflows float16 behind the loss. An infinity or NaN that a backward swallows (a maximum
    # with 0, a product with a mask of 0) would let a wrong step be taken.
    x, target = batch()
    flags = []
    for model in networks():
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.autocast(DEVICE.type, torch.float16):
            loss = F.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        flags.append({k: bool(p.grad.isfinite().all()) for k, p in model.named_parameters()})
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**39
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert flags[0] == flags[1]
    assert not flags[0]["bn1.weight"]


def test_activation_checkpointing() -> None:
    # Backward recomputes forward, with the device's generator put back: the same masks and bits.
    model, _ = networks(dropout=0.3)
    x, target = batch()
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        seed_all(3)
        F.cross_entropy(run(x), target).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_bitwise(*found)


def test_func_grad() -> None:
    # Autograd says what is right, on the GPU by the same kernels.
    model, _ = networks(dropout=0.3)
    x, target = batch()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        seed_all(3)
        state = parameters | {name: b.clone() for name, b in buffers.items()}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), target)

    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_bitwise(found, dict(zip(parameters, expected, strict=True)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export(training: bool) -> None:
    # What leaves this machine is not planned: PyTorch's convolutions there, any in eager mode.
    fused, plain = (model.train(training) for model in networks())
    x, _ = batch()
    dim = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(copy.deepcopy(fused), (x,), dynamic_shapes=({0: dim},))
    assert any("fastcnn" in str(node.target) for node in program.graph.nodes)
    for n in (8, 2):
        x, _ = batch(n, n)
        expected_logits(plain, x).check({"logits": program.module()(x).detach()})


def steps(dropout: float) -> dict[str, Tensor]:
    """Parameters, momenta and buffers after two steps."""
    model, _ = networks(dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seed_all(4)
    for seed in (0, 1):
        results(model, *batch(seed))
        optimizer.step()
    states = optimizer.state_dict()["state"]
    return {f"momentum {i}": s["momentum_buffer"] for i, s in states.items()} | model.state_dict()


def test_training_is_the_same_from_run_to_run() -> None:
    assert_bitwise(steps(0.3), steps(0.3))


def test_training_in_deterministic_mode(deterministic: None) -> None:
    # PyTorch raises there for what is not, fills memory that nobody has written with NaN, and warns
    # of nothing: no kernel reads before it writes.
    assert torch.utils.deterministic.fill_uninitialized_memory
    found = steps(0.3)
    assert all(t.isfinite().all() for t in found.values())
    assert_bitwise(found, steps(0.3))


def test_modes_and_devices_of_a_converted_model() -> None:
    # Folded weights follow what is written to parameters, and the model to the CPU and back.
    fused, plain = (model.eval() for model in networks())
    x, _ = batch()
    convert(fused, mode="infer")
    with torch.no_grad():
        for call in ("first", "second", "written to", "back from the CPU"):
            if call == "written to":
                for model in (fused, plain):
                    model.conv2.weight.mul_(1.5)
                    model.bn2.running_var.add_(0.5)
            if call == "back from the CPU":
                fused.to("cpu").to(DEVICE)
            expected_logits(plain, x).check({"logits": fused(x)})
    # Trained afterwards: no folded weight is left in use.
    target = batch()[1]
    expected_results(plain.train(), x, target).check(results(fused.train(), x, target))
