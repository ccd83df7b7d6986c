"""torch.compile on the card: inductor's kernels around fastcnn's, with and without CUDA graphs.

The expensive ones, so few. On the CPU aot_eager stands for inductor, which has its tests there in
tests/test_composition.py and tests/test_dropout_composition.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from card import DEVICE, HAS_CARD, needs_a_card
from card_networks import Results, batch, networks, results
from seeds import seed_all
from torch import Tensor, nn

from fastcnn.nn import Dropout

pytestmark = [
    pytest.mark.gpu,
    # Inductor warns of settings of PyTorch's that it would have otherwise, and of its own imports.
    pytest.mark.filterwarnings("ignore"),
]

# Of a value's largest element. Orders of summation differ, some tens of float32's roundings a layer
# (6e-8 each); another mask, a statistic of the wrong batch or a layer left out differ by 1e-2.
NEAR = 1e-4


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()


def assert_near(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        error = (found[name] - e).abs().max().item()
        assert error <= NEAR * max(e.abs().max().item(), 1e-3), f"{name}: {error:.1e}"


def test_a_converted_network_is_one_graph() -> None:
    # The same seeds are drawn, so the same masks; the second batch meets what the first compiled.
    eager, _ = networks(dropout=0.3)
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="inductor" if HAS_CARD else "aot_eager")
    for seed in (0, 1):
        found = []
        for model in (compiled, eager):
            seed_all(seed)
            found.append(results(model, *batch(seed)))
        assert_near(*found)


class Dropped(nn.Module):
    """y is 0 where, and only where, its gradient is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(4, 8, 1), Dropout(0.4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.dropout(self.conv(x).sigmoid() + y.exp())


@needs_a_card
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


@needs_a_card
def test_graph_trees_train_as_eager_does() -> None:
    # Running statistics are written in place by operators inside of the graphs; a graph that keeps
    # those of its capture, or reads an input of an earlier step, differs in the loss.
    torch._dynamo.utils.counters.clear()
    eager, _ = networks()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, mode="reduce-overhead")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (compiled, eager)]
    for seed in range(6):
        x, target = batch(seed)
        losses = []
        for model, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) <= 1e-3 * losses[1], f"step {seed}: {losses}"
    state = {k: t for k, t in eager.state_dict().items() if "running" in k}
    for name, e in state.items():
        error = (compiled.state_dict()[name] - e).abs().max().item()
        assert error <= 1e-2 * e.abs().max().item(), f"{name}: {error:.1e}"
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
