"""Modules of normalisations, and the operators of synchronised statistics, on the card."""

import copy
from contextlib import nullcontext
from typing import Any

import batch_norm_cases as batch_norm
import pytest
import torch
from card import DEVICE, on_card
from norm_cases import Place, compare
from seeds import seeded
from shapes import LAYOUTS
from tolerance import assert_as_exact_as_torch
from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, GroupNormAct, InstanceNormAct2d, LayerNorm2d
from fastcnn.ops.activation import ACT_NUMBER

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class PixelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


TRACKED: dict[str, Any] = {"affine": True, "track_running_stats": True}
MODULES: dict[str, tuple[nn.Module, nn.Module]] = {
    "batch norm": (BatchNormAct2d(6, act="silu"), nn.BatchNorm2d(6)),
    "cumulative": (BatchNormAct2d(6, momentum=None, act="silu"), nn.BatchNorm2d(6, momentum=None)),
    "group norm": (GroupNormAct(3, 6, act="silu"), nn.GroupNorm(3, 6)),
    "layer norm": (LayerNorm2d(6, act="silu"), PixelNorm(6)),
    "instance norm": (
        InstanceNormAct2d(6, **TRACKED, act="silu"), nn.InstanceNorm2d(6, **TRACKED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, training: bool) -> None:
    ours, theirs = (copy.deepcopy(module).train(training) for module in MODULES[name])
    x, dy = torch.randn(2, 4, 6, 5, 7, generator=seeded(1))

    def results(module: nn.Module, act: Any, place: torch.device | torch.dtype) -> Any:
        module = copy.deepcopy(module).to(place)
        leaf = x.to(place).requires_grad_()
        for _ in range(2):  # running statistics have moved before the second
            y = act(module(leaf))
        y.backward(dy.to(place))
        grads = {f"d{k}": p.grad for k, p in module.named_parameters()}
        found = {"y": y.detach(), "dx": leaf.grad, **grads, **dict(module.named_buffers())}
        return {k: t.cpu() for k, t in found.items()}

    exact = results(theirs, nn.SiLU(), torch.float64)
    eager = results(theirs, nn.SiLU(), DEVICE)
    with on_card():
        actual = results(ours, nn.Identity(), DEVICE)
    assert actual.keys() == exact.keys()
    for k, want in exact.items():
        if k == "num_batches_tracked":
            assert torch.equal(actual[k], want)
        else:  # sums of 4 * 5 * 7 values, none of them above 10
            assert_as_exact_as_torch(k, actual[k], eager[k], want, scale=1400.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_synchronised_statistics_make_the_whole(layout: str, dtype: torch.dtype) -> None:
    # The operators that three processes run, one of which has nothing. Between them: gather, sum.
    ops, eps, act = torch.ops.fastcnn, 1e-5, ACT_NUMBER["relu"]
    case = batch_norm.make_case((6, 5, 4, 7), dtype, layout, "relu", True, True, torch.float32)

    def parts(t: Tensor) -> list[Tensor]:
        return [p.contiguous(memory_format=LAYOUTS[layout]) for p in t.split((1, 0, 5))]

    here = case.to(DEVICE)
    affine = here.weight, here.bias
    xs, residuals, dys = parts(here.x), parts(here.residual), parts(here.dy)
    with on_card():
        gathered = torch.stack([ops.batch_norm_act_stats(x) for x in xs])
        mean, var, total = ops.batch_norm_join_stats(gathered)
        fixed = *affine, mean, var
        ys = [ops.batch_norm_act_apply(x, r, *fixed, eps, act)
              for x, r in zip(xs, residuals, strict=True)]  # fmt: skip
        running = here.running_mean.clone(), here.running_var.clone()
        ops.batch_norm_update_running(*running, mean, var, total, case.momentum, 0)
        images = list(zip(dys, xs, ys, strict=True))
        reduced = [ops.batch_norm_act_reduce(*three, *fixed, eps, act, True) for three in images]
        dweight, dbias = (torch.stack([r[i] for r in reduced]).sum(0) for i in (1, 2))
        dxs = [ops.batch_norm_act_dx(*three, *fixed, dweight, dbias, total, eps, act, True)
               for three in images]  # fmt: skip

    def joined(images: list[Tensor]) -> Tensor:
        return torch.cat(images).contiguous(memory_format=LAYOUTS[layout])

    found = {"y": joined(ys), "running_mean": running[0], "running_var": running[1],
             "dx": joined(dxs), "dresidual": joined([r[0] for r in reduced]),
             "dweight": dweight, "dbias": dbias}  # fmt: skip
    (eager,) = Place(DEVICE, nullcontext).run(batch_norm.run, case, batch_norm.torch_batch_norm_act)
    exact = batch_norm.run(batch_norm.torch_batch_norm_act, case.to(torch.float64))
    actual = {k: t.cpu() for k, t in found.items()}
    compare(case, actual, eager, exact, batch_norm.scales_of(case), 168)
