"""Where nothing may be tuned: traces, captures, fake tensors. The default plan runs there."""

import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.plan_cases import Clock, candidate, op, planner, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes

import fastcnn.plan
from fastcnn.plan import OPS, run
from fastcnn.plan.planner import Planner, _busy


class Double(torch.autograd.Function):
    """As ops call it: from within an autograd.Function."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        y = run(problem()._replace(x=tuple(x.shape), dtype=x.dtype, device=x.device), x)
        assert isinstance(y, Tensor)
        return y

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:  # type: ignore[override]
        return Double.apply(dy)


class Graphs:
    """A backend that writes down which candidates are in the graphs."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        targets = [node.target for part in parts for node in part.graph.nodes]
        self.found += [name for how, name in NAMES.items() if how in targets]
        return graph.forward


NAMES = {operator.add: "adds", operator.mul: "multiplies"}
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The process's planner tunes, and finds "adds" faster than the baseline, "multiplies"."""
    clock = Clock()
    ways = [
        candidate("adds", clock, 1.0, run=lambda _, x: x + x, passes=2),
        candidate("multiplies", clock, 2.0, passes=1),
    ]
    plans = planner("tune", clock, tmp_path, *ways, baseline="multiplies")
    monkeypatch.setitem(OPS, "double", op(*ways, baseline="multiplies"))
    monkeypatch.setattr(fastcnn.plan, "_planner", lambda: plans)
    torch._dynamo.reset()
    return clock


@pytorchs_own_warnings
def test_compiled_whole_and_untuned(clock: Clock) -> None:
    x = torch.randn(2, 8, 4, 4)
    graphs = Graphs()
    y = torch.compile(Double.apply, fullgraph=True, backend=graphs)(x)
    assert torch.equal(y, 2 * x)
    assert graphs.found == ["multiplies"]
    assert not clock.calls
    (row,) = fastcnn.plan.rows()
    assert row.problem.startswith("double x=2x8x4x4 ")
    assert row[1:3] == ("multiplies", "default")
    assert row.reason.startswith("not tuned under torch.compile; not measured; at least, by the ")

    # Eager tunes it later all the same, and what is traced then has the fastest.
    assert torch.equal(Double.apply(x), 2 * x)
    assert clock.calls
    torch._dynamo.reset()
    clock.calls.clear()
    torch.compile(Double.apply, fullgraph=True, backend=graphs)(x)
    assert graphs.found == ["multiplies", "adds"]
    assert not clock.calls
    (row,) = fastcnn.plan.rows()
    assert row[1:3] == ("adds", "tuned")


@pytorchs_own_warnings
def test_compiled_backward(clock: Clock) -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    y = torch.compile(Double.apply, fullgraph=True, backend="aot_eager")(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert not clock.calls


def test_torch_func(clock: Clock) -> None:
    # Eager, if under a transform: it is tuned, and tuning's own tensors stay out of the transform.
    x = torch.randn(2, 8, 4, 4)
    dx = torch.func.grad(lambda x: Double.apply(x).square().sum())(x)
    assert torch.equal(dx, 8 * x)  # of (2x)^2: products by powers of 2 are exact
    assert [row.source for row in fastcnn.plan.rows()] == ["tuned"]


@pytorchs_own_warnings
@pytest.mark.parametrize("dynamic", [True, None])
def test_symbolic_sizes(dynamic: bool | None, clock: Clock) -> None:
    graphs = Graphs()
    compiled = torch.compile(Double.apply, fullgraph=True, backend=graphs, dynamic=dynamic)
    for n in (2, 3, 5, 7):
        x = torch.randn(n, 8, 4, 4)
        assert torch.equal(compiled(x), 2 * x)
    # The plan specialises nothing: one graph for all n, or one for the first and one for the rest.
    assert len(graphs.found) == (1 if dynamic else 2)
    assert [row.problem.split()[1] for row in fastcnn.plan.rows()] == (
        ["x=2x8x4x4"] if dynamic else ["x=2x8x4x4", "x=3x8x4x4"]
    )
    assert not clock.calls


@pytorchs_own_warnings
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("symbolic", [True, False])
def test_export(strict: bool, symbolic: bool, clock: Clock) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(x)

    x = torch.randn(2, 8, 4, 4)
    sizes = {"x": {0: torch.export.Dim("n")}} if symbolic else None
    program = torch.export.export(Net(), (x,), dynamic_shapes=sizes, strict=strict)
    assert torch.equal(program.module()(x), 2 * x)
    assert not clock.calls


@pytorchs_own_warnings
def test_a_torch_that_does_not_tell_sizes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch 2.11 has no optimization_hint.
    monkeypatch.setattr(fastcnn.plan, "_concrete", symbolic_shapes.guard_scalar)
    graphs = Graphs()
    compiled = torch.compile(Double.apply, fullgraph=True, backend=graphs, dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, 8, 4, 4)
        assert torch.equal(compiled(x), 2 * x)
    assert graphs.found == ["multiplies", "multiplies"]
    assert not clock.calls


def capturing_planner(clock: Clock, folder: Path, busy: list[str | None]) -> Planner:
    ways = [candidate("a", clock, 1.0, passes=2), candidate("b", clock, 2.0, passes=1)]
    return planner("tune", clock, folder, *ways, baseline="b", busy=lambda _: busy[0])


def test_simulated_capture(tmp_path: Path) -> None:
    clock = Clock()
    busy: list[str | None] = ["while a CUDA graph is captured"]
    plans = capturing_planner(clock, tmp_path, busy)
    plan = plans.choose(problem())
    assert (plan.name, plan.source) == ("b", "default")
    assert plan.reason.startswith("not tuned while a CUDA graph is captured; not measured")
    assert plans.plans() == {problem(): plan}
    assert not clock.calls
    assert not list(tmp_path.iterdir())
    # Met outside of a capture it is tuned, and from then on known inside as well.
    busy[0] = None
    tuned = plans.choose(problem())
    assert (tuned.name, tuned.source) == ("a", "tuned")
    busy[0] = "while a CUDA graph is captured"
    assert plans.choose(problem()) == tuned
    assert plans.plans() == {problem(): tuned}
    # So does what the file has, in a process whose first call is captured.
    clock.calls.clear()
    assert capturing_planner(clock, tmp_path, busy).choose(problem()) == tuned
    assert not clock.calls


def test_fake_tensors_time_nothing(tmp_path: Path) -> None:
    clock = Clock()
    plans = planner("tune", clock, tmp_path, candidate("a", clock))
    with FakeTensorMode():
        plan = plans.choose(problem())
    assert plan.source == "default"
    assert plan.reason.startswith("not tuned under a dispatch mode; ")
    assert not clock.calls
    assert plans.choose(problem()).source == "tuned"


def test_the_capture_is_asked_for_on_the_problem_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(entered))
    assert _busy(torch.device("cpu")) is None
    assert _busy(torch.device("cuda", 1)) == "while a CUDA graph is captured"
    assert entered == [torch.device("cuda", 1)]
