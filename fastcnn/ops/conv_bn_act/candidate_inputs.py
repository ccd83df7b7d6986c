"""What the candidates of a step in training are checked with: synthetic tensors, float64 results.

The formulas are those of fastcnn/ops/conv_bn_act/candidates.py's two ops, from convolutions and
activations of plain PyTorch; the gradients are autograd's, but for batch norm's own, whose sums are
synthetic.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.activation import activation
from fastcnn.ops.conv_bn_act.problem import EPS, Synthetic, act_of, geometry_of, normalised
from fastcnn.plan import Problem


def _exact_input(problem: Problem, x: Tensor, norm: Sequence[Tensor]) -> tuple[Tensor, str]:
    """Return what stands before the activation in front of the convolution, and its name."""
    act = act_of(problem, "in")
    return (x.double(), "none") if act is None else (normalised(x, norm), act)


def fwd_tensors(problem: Problem, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return x, weight, and the norm before where there is one."""
    synthetic = Synthetic(problem, generator)
    norm = () if act_of(problem, "in") is None else synthetic.norm(problem.x[1])
    return synthetic.image(problem.x), synthetic.weight(), *norm


def fwd_exact(problem: Problem, x: Tensor, weight: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    """Return the convolution output, and in training its mean and biased variance."""
    a = activation(*_exact_input(problem, x, norm))
    raw = F.conv2d(a, weight.double(), None, *geometry_of(problem))
    of_channels = raw.transpose(0, 1).flatten(1)
    found = raw, of_channels.mean(1), of_channels.var(1, correction=0)
    return found if "training" in problem.options else found[:1]


def bwd_tensors(problem: Problem, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return dz, raw, x, weight, the norm behind, its sums, and the norm before where there is."""
    synthetic, c_out = Synthetic(problem, generator), problem.y[1]
    images = synthetic.image(problem.y), synthetic.image(problem.y), synthetic.image(problem.x)
    # Sums of as many values as there are, of deviation 1 each.
    sums = [synthetic.numbers(c_out) * _values(problem) ** 0.5 for _ in range(2)]
    norm = () if act_of(problem, "in") is None else synthetic.norm(problem.x[1])
    return *images, synthetic.weight(), *synthetic.norm(c_out), *sums, *norm


def _values(problem: Problem) -> int:
    n, _, h, w = problem.y
    return n * h * w


def bwd_exact(
    problem: Problem, dz: Tensor, raw: Tensor, x: Tensor, weight: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    """Return dx, dweight, and dx's sums where there is a norm before; without dx where no_dx."""
    mean, var, gamma, _, gradient, times_xhat = (t.double()[:, None, None] for t in rest[:6])
    rstd, d = 1 / (var + EPS).sqrt(), dz.double()
    if "training" in problem.options:
        xhat = (raw.double() - mean) * rstd
        d = d - (gradient + xhat * times_xhat) / _values(problem)
    z, act = _exact_input(problem, x, rest[6:])
    leaves = [weight.double().requires_grad_()]
    if "no_dx" not in problem.options:
        leaves.insert(0, z.requires_grad_())
    with torch.enable_grad():
        y = F.conv2d(activation(z, act), leaves[-1], None, *geometry_of(problem))
    found = torch.autograd.grad(y, leaves, d * rstd * gamma)
    return *found, *_exact_sums(problem, found[0], x, rest[6:])


def _exact_sums(
    problem: Problem, dz: Tensor, x: Tensor, norm: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    if not norm:
        return ()
    mean, var = (t.double()[:, None, None] for t in norm[:2])
    xhat = (x.double() - mean) / (var + EPS).sqrt()
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))


def bwd_finalize(
    problem: Problem, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return dx in front of the activation: the next pass over it takes the derivative itself."""
    z, act = _exact_input(problem, inputs[2], inputs[10:])
    if act == "none" or "no_dx" in problem.options:
        return outputs
    with torch.enable_grad():
        y = activation(z.requires_grad_(), act)
    (dz,) = torch.autograd.grad(y, z, outputs[0].double())
    return dz.to(outputs[0].dtype), *outputs[1:]
