"""torch.compile on a GPU: inductor's kernels around fastcnn's, with and without CUDA graphs.

The expensive ones, so few. On the CPU aot_eager replaces inductor, which has its tests there in
tests/ops/test_integration.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE, HAS_GPU, needs_gpu
from support.gpu_networks import batch, expected_results, networks, results
from support.seeds import seed_all
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn.nn import Dropout

pytestmark = [
    pytest.mark.gpu,
    # Inductor warns of settings of PyTorch's that it would have otherwise, and of its own imports.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()


def compiled(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.compile(fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    return other


def test_a_converted_network_is_one_graph() -> None:
    # The same seeds are drawn, so the same masks; the second batch meets what the first compiled.
    # Float64 tells another function from other orders of summation (support/tolerance.py).
    eager = networks(dropout=0.3)[0].double()
    graph = compiled(eager)
    for seed in (0, 1):
        found, (x, target) = [], batch(seed)
        for model in (graph, eager):
            seed_all(seed)
            found.append(results(model, x.double(), target))
        for name, expected in found[1].items():
            assert_same(found[0][name], expected, name=name)


@needs_gpu
def test_a_compiled_network_is_as_exact_as_its_arithmetic() -> None:
    fused, plain = networks()
    x, target = batch()
    expected_results(plain, x, target).check(results(compiled(fused), x, target))


class Dropped(nn.Module):
    """y is 0 where, and only where, its gradient is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(4, 8, 1), Dropout(0.4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.dropout(self.conv(x).sigmoid() + y.exp())


@needs_gpu
def test_graph_trees_draw_anew_at_every_replay() -> None:
    # mode="reduce-overhead" captures forward and backward apart. A seed frozen at the capture gives
    # one mask for ever; one that backward does not get from forward, a gradient of another mask.
    torch._dynamo.utils.counters.clear()
    model = Dropped().to(DEVICE)
    run = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(4, 4, 16, 16, device=DEVICE)
    masks: list[Tensor] = []
    for _ in range(6):  # two warm-ups, the capture, replays
        model.zero_grad()  # a gradient lies in a graph's memory, which the next step writes over
        torch.compiler.cudagraph_mark_step_begin()
        y = torch.zeros(4, 8, 16, 16, device=DEVICE, requires_grad=True)
        z = run(x, y)
        z.sum().backward()
        masks.append((z.detach() != 0).clone())
        assert torch.equal(y.grad != 0, masks[-1])
        assert 0.55 < masks[-1].float().mean() < 0.65  # 8192 draws: 9 deviations
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@needs_gpu
def test_graph_trees_train_as_eager_does() -> None:
    # Running statistics are written in place by operators inside of the graphs; a graph that keeps
    # those of its capture, or reads an input of an earlier step, differs in the loss.
    torch._dynamo.utils.counters.clear()
    eager = networks()[0].double()
    graphed = copy.deepcopy(eager)
    graphed.compile(fullgraph=True, mode="reduce-overhead")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (graphed, eager)]
    for seed in range(6):
        x, target = batch(seed)
        losses = []
        for model, optimizer in zip((graphed, eager), optimizers, strict=True):
            optimizer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(model(x.double()), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        assert_same(*losses, name=f"step {seed}")
    for name, e in eager.state_dict().items():
        if "running" in name:
            assert_same(graphed.state_dict()[name], e, name=name)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
