"""Modules of normalisations, and the operators of synchronised statistics, on the GPU."""

import copy
from typing import Any

import pytest
import torch
from support import batch_norm_cases as batch_norm
from support.device import DEVICE, on_gpu
from support.norm_cases import compare, halved, norm_errors, normalised_by_group
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded
from torch import Tensor, nn

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.nn import BatchNormAct2d, GroupNormAct, InstanceNormAct2d, LayerNorm2d

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
        InstanceNormAct2d(6, **TRACKED, act="silu"),
        nn.InstanceNorm2d(6, **TRACKED),
    ),
}


def errors_of(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """How far each of the module's results may be from float64's before it is rounded."""
    affine = module.weight, module.bias
    tracked = isinstance(module, nn.InstanceNorm2d) and not module.training
    if isinstance(module, nn.BatchNorm2d) or tracked:
        stats = module.running_mean, module.running_var
        case = batch_norm.Case(x, None, *affine, *stats, dy, module.training, "silu")
        return norm_errors(batch_norm.normalised(case), torch.float32)
    groups = {nn.GroupNorm: 3, PixelNorm: None, nn.InstanceNorm2d: 6}[type(module)]
    terms = normalised_by_group(x.double(), *affine, dy.double(), groups, module.eps)
    errors = norm_errors(terms, torch.float32)
    # Those of instance norm are means over samples, of which each may err by so much.
    return errors | {k: errors[k].mean(0) for k in ("running_mean", "running_var")}


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
    with on_gpu():
        actual = results(ours, nn.Identity(), DEVICE)
    assert actual.keys() == exact.keys()
    with torch.no_grad():
        errors = errors_of(theirs.double(), x, dy)
    for k, want in exact.items():
        if k == "num_batches_tracked":
            assert torch.equal(actual[k], want)
        else:  # both batches are the same, so that their average errs as each does
            error = errors[k].flatten() if k.startswith("running") else errors[k]
            assert_rounded(k, actual[k], want, error)


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
    with on_gpu():
        gathered = torch.stack([ops.batch_norm_act_stats(x) for x in xs])
        mean, var, total = ops.batch_norm_join_stats(gathered)
        fixed = *affine, mean, var
        ys = [
            ops.batch_norm_act_apply(x, r, *fixed, eps, act)
            for x, r in zip(xs, residuals, strict=True)
        ]
        running = here.running_mean.clone(), here.running_var.clone()
        ops.batch_norm_update_running(*running, mean, var, total, case.momentum, 0)
        images = list(zip(dys, xs, ys, strict=True))
        reduced = [ops.batch_norm_act_reduce(*three, *fixed, eps, act, True) for three in images]
        dweight, dbias = (torch.stack([r[i] for r in reduced]).sum(0) for i in (1, 2))
        dxs = [
            ops.batch_norm_act_dx(*three, *fixed, dweight, dbias, total, eps, act, True)
            for three in images
        ]

    def concatenated(images: list[Tensor]) -> Tensor:
        return torch.cat(images).contiguous(memory_format=LAYOUTS[layout])

    found = {"y": concatenated(ys), "running_mean": running[0], "running_var": running[1],
             "dx": concatenated(dxs), "dresidual": concatenated([r[0] for r in reduced]),
             "dweight": dweight, "dbias": dbias}  # fmt: skip
    exact = batch_norm.run(batch_norm.torch_batch_norm_act, case.to(torch.float64))
    actual, terms = {k: t.cpu() for k, t in found.items()}, batch_norm.normalised(case)
    compare(case, actual, exact, norm_errors(terms, dtype), halved(terms))
