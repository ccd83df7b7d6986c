"""Initial weights: torchvision's way for networks with batch norm, and the choices of init=."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["INITS", "init_conv_bn", "initialise"]

_kaiming = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")

INITS: dict[str, Callable[..., Any]] = {
    "kaiming": _kaiming,  # N(0, 2 / fan_out), He et al. 2015, arXiv 1502.01852
    "xavier": nn.init.xavier_uniform_,  # variance 2 / (fan_in + fan_out), Glorot and Bengio 2010
    "normal": partial(nn.init.normal_, std=0.01),  # AlexNet's
    "zeros": nn.init.zeros_,
}

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


def initialise(model: nn.Module, init: str) -> None:
    """Draw every convolution's and linear layer's weight anew; biases 0, norms' gamma 1, beta 0.

    `init`: "kaiming", N(0, 2 / fan_out); "xavier", uniform of variance 2 / (fan_in + fan_out);
    "normal", N(0, 0.01^2); "zeros".

    Raises:
        ValueError: an unknown `init`.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            INITS[init](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _NORMS):
            _init_norm(module)


def init_conv_bn(model: nn.Module) -> None:
    """Conv weights ~ N(0, 2 / fan_out), biases 0; norms' gamma 1, beta 0. Linear layers stay."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _kaiming(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _NORMS):
            _init_norm(module)


def _init_norm(norm: nn.Module) -> None:
    if isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor):  # None: not affine
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
