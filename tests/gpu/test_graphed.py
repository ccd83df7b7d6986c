"""fastcnn.graphed: calls that are replays do what calls of the function do, or say why not."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE, HAS_GPU, needs_gpu
from support.gpu_graphs import graphed_here
from support.seeds import seed_all, seeded
from torch import Tensor, nn

import fastcnn
from fastcnn import functional, models

pytestmark = pytest.mark.gpu

CALLS, WARMUP = 6, 2


@pytest.fixture(autouse=True)
def same_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's fastest weight gradients differ from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def network() -> nn.Module:
    seed_all(0)
    model = nn.Sequential(models.resnet20(), fastcnn.nn.Dropout(0.2))
    return fastcnn.convert(model).to(DEVICE, memory_format=torch.channels_last)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(8, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    return x.to(DEVICE), torch.randint(10, (8,), generator=generator).to(DEVICE)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


class Training:
    """A network, its optimizer, and a step."""

    def __init__(self, model: nn.Module, **how: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **({"lr": 0.05} | how))
        for p in model.parameters():  # else the first step of all would make them
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def step(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        y = self.model(x)
        loss = F.cross_entropy(y, target)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "y": y}

    def state(self) -> list[Tensor]:
        momenta = [of["momentum_buffer"] for of in self.optimizer.state.values()]
        return [*self.model.state_dict().values(), *momenta]


def test_a_training_step() -> None:
    # Every call, before, at and after the capture, returns what the step returns, to the bit, and
    # leaves parameters, momenta, statistics and counted batches as it does. Shows: a step that runs
    # once too often or not at all, a batch or a mask of the capture, a result that is overwritten.
    plain = Training(network())
    mine = Training(copy.deepcopy(plain.model))
    step = graphed_here(mine.step, *batch(0), state=mine.state(), warmup=WARMUP)
    found, expected = [], []
    for seed in range(CALLS):
        seed_all(seed)
        found.append(step(*batch(seed)))
        seed_all(seed)
        expected.append(plain.step(*batch(seed)))
    for one, other in zip(found, expected, strict=True):
        assert list(one) == ["loss", "y"]
        assert not one["loss"].requires_grad
        assert torch.equal(one["loss"], other["loss"])
        assert torch.equal(one["y"], other["y"])
    for one, other in zip(mine.state(), plain.state(), strict=True):
        assert torch.equal(one, other)


def test_a_network_in_inference() -> None:
    model = network().eval()
    run = graphed_here(model, batch(0)[0], warmup=1)
    with torch.no_grad():
        for seed in range(4):
            x, _ = batch(seed)
            assert torch.equal(run(x), model(x))


def test_dropout_draws_anew() -> None:
    x = torch.ones(4, 8, 8, 8, device=DEVICE)
    run = graphed_here(lambda x: functional.dropout(x, 0.5), x, warmup=1)
    first, *rest = [run(x) for _ in range(4)]
    assert all(not torch.equal(first, other) for other in rest)


def warmed(function: Any, *inputs: Any) -> Any:
    """Return a function that is captured."""
    run = graphed_here(function, *inputs, warmup=1)
    for _ in range(2):
        run(*inputs)
    return run


@pytest.mark.parametrize(
    ("x", "names"),
    [
        (torch.ones(3, 3), r"expected 2x3 float32 on .*, got 3x3 float32"),
        (torch.ones(2, 3, dtype=torch.float64), r"got 2x3 float64"),
        (7, r"expected 2x3 float32 on .*, got 7"),
        (torch.ones(2, 3, requires_grad=True), r"got 2x3 float32 on .*, which requires a gradient"),
    ],
)
def test_inputs_of_another_kind(x: Any, names: str) -> None:
    example = torch.ones(2, 3, device=DEVICE)
    x = x.to(DEVICE) if isinstance(x, Tensor) else x
    run = graphed_here(lambda x: 2 * x, example)
    for call in (run, warmed(lambda x: 2 * x, example)):
        with pytest.raises(ValueError, match=names):
            call(x)


def test_another_number_or_form_of_inputs() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    run = warmed(lambda x, by: by * x["image"], {"image": x}, 2)
    assert torch.equal(run({"image": x}, 2), 2 * x)
    with pytest.raises(ValueError, match="input 1: expected 2 as in the example, got 3"):
        run({"image": x}, 3)
    with pytest.raises(TypeError, match=r"expected \(\{'image': '2x3 float32 .*, got \('2x3"):
        run(x, 2)


def test_settings_that_the_graph_has_as_they_were() -> None:
    model, (x, _) = network().eval(), batch(0)
    with torch.no_grad():
        run = warmed(model, x)
        model.train()
        with pytest.raises(ValueError, match="expected training as at the capture"):
            run(x)
        model.eval()
        with (
            torch.autocast(DEVICE.type, torch.bfloat16),
            pytest.raises(ValueError, match=r"autocast as at the capture None, got .*bf"),
        ):
            run(x)
    with pytest.raises(ValueError, match="grad_mode as at the capture False, got True"):
        run(x)


def test_a_number_of_an_optimizer_that_changes() -> None:
    # A schedule sets lr: a graph that has it as a number would go on with the first one.
    mine = Training(network())
    step = graphed_here(mine.step, *batch(0), state=mine.state(), warmup=1)
    for _ in range(2):
        step(*batch(0))
    mine.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match=r"SGD: lr of group 0: expected 0.05 .*, got 0.01"):
        step(*batch(0))


def test_a_schedule_in_the_function() -> None:
    # The kernels have the number from before the schedule's step.
    mine = Training(network())
    schedule = torch.optim.lr_scheduler.ExponentialLR(mine.optimizer, 0.9)

    def step(x: Tensor, target: Tensor) -> None:
        mine.step(x, target)
        schedule.step()

    run = graphed_here(step, *batch(0), state=mine.state(), warmup=1)
    run(*batch(0))
    with pytest.raises(ValueError, match=r"SGD: lr of group 0: expected 0.045.* got 0.0405"):
        run(*batch(0))


def test_modules_and_parameters_that_change() -> None:
    # Also where the function is no module, and calls one.
    model, (x, _) = network().eval(), batch(0)
    with torch.no_grad():
        run = warmed(lambda x: model(x), x)
        model[0].bn1.train()
        with pytest.raises(ValueError, match="expected training as at the capture"):
            run(x)
        model.eval()
        model[0].fc.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="expected parameters as at the capture"):
            run(x)
        model[0].fc.weight.requires_grad_(True)
        run(x)
        model[0].fc.weight.data = model[0].fc.weight.data.clone()
        with pytest.raises(ValueError, match="expected parameters as at the capture"):
            run(x)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_outside(set_to_none: bool) -> None:
    # zero_grad() takes away what the graph writes, or fills it with 0: parameters have it again.
    plain = Training(network())
    mine = Training(copy.deepcopy(plain.model))

    def forward_backward(model: nn.Module, x: Tensor, target: Tensor) -> None:
        F.cross_entropy(model(x), target).backward()

    def run(x: Tensor, target: Tensor) -> None:
        forward_backward(mine.model, x, target)

    gradients = [torch.zeros_like(p) for p in mine.model.parameters()]
    for p, gradient in zip(mine.model.parameters(), gradients, strict=True):
        p.grad = None if set_to_none else gradient
    state = [*mine.state(), *([] if set_to_none else gradients)]
    leaves = list(mine.model.parameters())
    graph = graphed_here(run, *batch(0), state=state, parameters=leaves, warmup=1)
    for seed in range(4):
        for one in (plain, mine):
            one.optimizer.zero_grad(set_to_none=set_to_none)
            seed_all(seed)
            if one is mine:
                graph(*batch(seed))
            else:
                forward_backward(plain.model, *batch(seed))
            assert all(p.grad is not None for p in one.model.parameters())
            one.optimizer.step()
    for one, other in zip(mine.state(), plain.state(), strict=True):
        assert torch.equal(one, other)
    if not set_to_none:
        mine.optimizer.zero_grad(set_to_none=True)
        with pytest.raises(ValueError, match=r"expected gradients in the memory .* the capture"):
            graph(*batch(0))


def test_a_call_that_raises_warms_nothing_up() -> None:
    calls = []

    def once(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("of another process")
        return 2 * x

    x = torch.ones(2, device=DEVICE)
    run = graphed_here(once, x, warmup=1)
    with pytest.raises(torch.OutOfMemoryError):
        run(x)
    assert "1 calls before the capture" in repr(run)
    assert torch.equal(run(x), 2 * x)
    assert torch.equal(run(3 * x), 6 * x)


@needs_gpu
def test_adam_makes_its_state_while_it_warms_up() -> None:
    plain, how = network(), {"lr": scalar(1e-3), "capturable": True}
    mine = copy.deepcopy(plain)
    steps = []
    for model in (plain, mine):
        optimizer = torch.optim.Adam(model.parameters(), **how)

        def step(x: Tensor, target: Tensor, model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()

        steps.append(step)
    graph = graphed_here(steps[1], *batch(0), warmup=1)
    for seed in range(4):
        for run in (steps[0], graph):
            seed_all(seed)
            run(*batch(seed))
    assert_same(mine, plain)


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    for (name, one), other in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


@needs_gpu
def test_a_schedule_of_a_tensor() -> None:
    plain = Training(network(), lr=scalar(0.05), fused=True)
    mine = Training(copy.deepcopy(plain.model), lr=scalar(0.05), fused=True)
    step = graphed_here(mine.step, *batch(0), warmup=1)
    for seed in range(4):
        for one, run in ((mine, step), (plain, plain.step)):
            one.optimizer.param_groups[0]["lr"].fill_(0.05 / (seed + 1))
            seed_all(seed)
            run(*batch(seed))
    for one, other in zip(mine.state(), plain.state(), strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_a_scaler() -> None:
    # An overflow in a replay: no step, and the scale halves, without a word to the CPU.
    model = nn.Linear(4, 4, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    run = warmed(step, torch.ones(2, 4, device=DEVICE))
    before = model.weight.detach().clone()
    run(torch.full((2, 4), float("inf"), device=DEVICE))
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() == 2.0
    run(torch.ones(2, 4, device=DEVICE))
    assert not torch.equal(model.weight, before)


@needs_gpu
def test_what_cannot_be_captured() -> None:
    run = graphed_here(lambda x: x * x.sum().item(), torch.ones(2, device=DEVICE), warmup=1)
    run(torch.ones(2, device=DEVICE))
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="expected a function that reads no result on the CPU"):
        run(torch.ones(2, device=DEVICE))
    assert torch.cuda.current_stream() == stream
    assert torch.randn(2, device=DEVICE).isfinite().all()  # the generator is no graph's any more


@pytest.mark.parametrize(
    ("function", "example", "warmup", "error", "names"),
    [
        (7, (torch.ones(1),), 3, TypeError, "function: expected a callable, got int"),
        (abs, (), 3, ValueError, "expected tensors of one GPU or the CPU, got no tensor"),
        (abs, (torch.ones(1, device="meta"),), 3, ValueError, "got meta"),
        (abs, (torch.ones(1), object()), 3, TypeError, "strings and None, got object"),
        (abs, (torch.ones(1, requires_grad=True),), 3, ValueError, "which requires a gradient"),
        (abs, (torch.ones(1),), 0, ValueError, "warmup: expected an integer of 1 or more, got 0"),
    ],
)
def test_arguments(function: Any, example: Any, warmup: Any, error: Any, names: str) -> None:
    with pytest.raises(error, match=names):
        fastcnn.graphed(function, *example, warmup=warmup)


def test_on_the_cpu_it_is_the_function() -> None:
    assert fastcnn.graphed(abs, torch.ones(1)) is abs


@pytest.mark.skipif(HAS_GPU, reason="expects that there is no GPU")
def test_the_doubles_capture_changes_nothing() -> None:
    mine = Training(network())
    step = graphed_here(mine.step, *batch(0), state=mine.state(), warmup=1)
    step(*batch(0))
    before = [t.clone() for t in mine.state()]
    step._capture(list(batch(0)))
    for t, value in zip(mine.state(), before, strict=True):
        assert torch.equal(t, value)
