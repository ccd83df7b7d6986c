"""CUDA graphs: what is captured computes, replayed on new data, what eager calls compute."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE, needs_gpu
from support.gpu_calls import CALLS, assert_equal, inputs, run
from support.gpu_graphs import WARM_UPS, captured
from support.paths import TESTS
from support.seeds import seed_all, seeded
from torch import Tensor, nn

import fastcnn.plan
from fastcnn import convert, functional, models, reference
from fastcnn.ops.dropout import draw_seed
from fastcnn.plan import OPS
from fastcnn.plan.planner import Planner

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def same_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's fastest weight gradients differ from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_computes_what_eager_does(name: str) -> None:
    # Shows: a size, a pointer or a number of the first call that is frozen in the graph and should
    # not be; memory of the graph's own that outlives no capture; a launch on another stream, which
    # the capture would miss or refuse; a copy from or to the CPU.
    late, constant = inputs(name, 1)
    found, replay = captured(lambda: run(name, late, constant))
    for seed in (2, 3):
        new, _ = inputs(name, seed)
        for t, value in zip(late, new, strict=True):
            t.copy_(value)
        seed_all(seed)
        replay()
        seed_all(seed)
        assert_equal(found, run(name, new, constant))


@pytest.mark.parametrize("per_channel", [False, True])
def test_dropout_draws_anew_at_every_replay(per_channel: bool) -> None:
    # The masks of the seeds that the generator would have drawn in eager mode, one a replay, bit
    # for bit those of the reference. A seed that is a number in the graph gives one mask for ever;
    # one that backward draws again, another there.
    x = torch.ones(2, 64, 8, 7, device=DEVICE)

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = functional.dropout(leaf, 0.4, per_channel=per_channel)
        return [y.detach(), *torch.autograd.grad(y, leaf, x)]

    found, replay = captured(step)
    seed_all(5)
    replayed = []
    for _ in range(3):
        replay()
        replayed.append([t.clone().cpu() for t in found])
    seed_all(5)
    for y, dx in replayed:
        seed = int(draw_seed(DEVICE).item())
        expected = reference.dropout(torch.ones(x.shape), seed, 0.4, per_channel=per_channel)
        assert torch.equal(y, expected)
        assert torch.equal(dx, expected)
    assert not torch.equal(replayed[0][0], replayed[1][0])


def network() -> nn.Module:
    seed_all(0)
    model = nn.Sequential(models.resnet20(), nn.Dropout(0.2))
    return convert(model).to(DEVICE, memory_format=torch.channels_last)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(8, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    return x.to(DEVICE), torch.randint(10, (8,), generator=generator).to(DEVICE)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def assert_same_state(model: nn.Module, plain: nn.Module) -> None:
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("optimizer_inside", [True, False])
def test_a_whole_training_step(optimizer_inside: bool) -> None:
    # Parameters, momenta, running statistics and batches counted after three replays are to the bit
    # those of three eager steps: nothing is left out of the graph, nothing runs twice.
    model, (x, target) = network(), batch(0)
    optimizer = optimizer_of(model)

    def forward_backward(
        model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor
    ) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        if optimizer_inside:
            optimizer.step()
        return loss.detach()

    found, replay = captured(lambda: [forward_backward(model, optimizer, x, target)])
    plain = copy.deepcopy(model)
    plain_optimizer = optimizer_of(plain)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2, 3):
        new_x, new_target = batch(seed)
        x.copy_(new_x)
        target.copy_(new_target)
        seed_all(seed)
        replay()
        seed_all(seed)
        loss = forward_backward(plain, plain_optimizer, new_x, new_target)
        if not optimizer_inside:
            optimizer.step()
            plain_optimizer.step()
        assert torch.equal(found[0], loss)
    assert_same_state(model, plain)
    counted = model.state_dict()["0.bn1.num_batches_tracked"]
    assert counted.item() == WARM_UPS + 3


# PyTorch's own static outputs keep the capture's autograd graph, and its stream, alive.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@needs_gpu
def test_graphed_callables() -> None:
    # PyTorch's graphs of forward and backward by themselves, dropout's seed in the first.
    model, (x, target) = network(), batch(0)
    plain = copy.deepcopy(model)
    torch.cuda.make_graphed_callables(model, (x,))
    plain.load_state_dict(model.state_dict())  # its warm-up has moved running statistics
    for seed in (1, 2):
        x, target = batch(seed)
        for one in (model, plain):
            one.zero_grad()
            seed_all(seed)
            F.cross_entropy(one(x), target).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
    assert_same_state(model, plain)
    x, _ = batch(3)  # in evaluation PyTorch leaves the graph
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_a_module_with_a_graphed_forward_is_called_as_it_was() -> None:
    # make_graphed_callables gives the module a forward of its own, which calls the old one where
    # the training flag differs: the conversion must neither mind nor warn.
    model, (x, _) = network().eval(), batch(0)
    expected, original = model(x), model.forward
    model.forward = lambda *args: original(*args)
    assert torch.equal(model(x), expected)


@needs_gpu
def test_a_problem_that_is_first_met_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is run to check it, which would be captured too: the default plan runs, the report
    # says that it is not checked, and the next call outside checks it.
    model, (x, _) = network().eval(), batch(0)
    planners = [Planner("off", OPS, {}) for _ in range(2)]
    with torch.no_grad():
        monkeypatch.setattr(fastcnn.plan, "_planner", lambda: planners[0])
        expected = model(x)  # loads and compiles what a capture must not
        monkeypatch.setattr(fastcnn.plan, "_planner", lambda: planners[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        known, met = (planner.plans() for planner in planners)
        assert known
        assert {p: plan.name for p, plan in met.items()} == {
            p: plan.name for p, plan in known.items()
        }
        for plan in met.values():
            assert plan.reason.startswith("not checked while a CUDA graph is captured; ")
        graph.replay()
        assert torch.equal(found, expected)
        assert torch.equal(model(x), expected)
        assert planners[1].plans() == known


@needs_gpu
def test_scales_that_nobody_has_looked_at_are_refused_in_a_capture() -> None:
    # conv2d_int8 looks at weight_scale and bias once, which waits for the device: in a capture it
    # says what to do instead, the capture ends in order, and the next one succeeds.
    late, constant = inputs("conv2d_int8", 1)
    expected = run("conv2d_int8", late, constant)
    new = [t.clone() for t in constant]
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            late[0].clone()  # PyTorch warns of a graph of nothing
            run("conv2d_int8", late, new)

    with pytest.raises(RuntimeError, match="call once with the very same"):
        capture()
    found, replay = captured(lambda: run("conv2d_int8", late, new))
    replay()
    assert_equal(found, expected)


FIRST = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from support.gpu_calls import CALLS, assert_equal, inputs, run
from support.seeds import seed_all

for name in CALLS:
    if "conv" in name or "inference" in name:  # cuDNN, Triton: the docs ask for a call before
        continue
    late, constant = inputs(name, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(name, late, constant)
    seed_all(1)
    graph.replay()
    seed_all(1)
    assert_equal(found, run(name, late, constant))
    print(name)
"""


@needs_gpu
def test_a_kernel_s_first_launch_may_be_captured() -> None:
    # In a process of its own, where each kernel is loaded, and allowed its shared memory, while the
    # capture is on.
    command = [sys.executable, "-W", "error", "-c", FIRST, str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, f"after {done.stdout.split(chr(10))[-2:]}: {done.stderr[-2000:]}"
