"""Checkpoints into networks: torchvision's and timm's keys, other input channels and classes."""

import math
import warnings
from typing import NamedTuple

from torch import Tensor, nn

from fastcnn.models.checkpoint import PathLike, read_state_dict
from fastcnn.models.network import Network

__all__ = ["Loaded", "load_weights"]


class Loaded(NamedTuple):
    """What load_weights did beside copying.

    `adapted`: weights brought to other input channels; `untouched`: keys of classifiers for other
    classes, left as they were; `ignored`: keys of heads that the network does without.
    """

    adapted: list[str]
    untouched: list[str]
    ignored: list[str]


def load_weights(
    model: nn.Module,
    path: PathLike,
    *,
    adapt_in_chans: bool = False,
    adapt_num_classes: bool = False,
) -> Loaded:
    """Copy a checkpoint's tensors into `model`, a network of fastcnn.models.

    Keys may be torchvision's or timm's. With `adapt_in_chans` the first convolution takes other
    input channels, as timm: summed for one channel, else repeated and scaled by old / new. With
    `adapt_num_classes` a classifier of another number of classes is left as it is, with a warning.
    The counters of batch norms may be missing, as in files of older PyTorch.

    Args:
        model: of fastcnn.models.
        path: of a .pth or .safetensors.
        adapt_in_chans: see above.
        adapt_num_classes: see above.

    Returns:
        What was done beside copying.

    Raises:
        TypeError: `model` is none of fastcnn.models.
        ValueError: `model` on the meta device; no checkpoint; missing or unexpected keys or other
            shapes, each named.
        FileNotFoundError, ImportError: see read_state_dict.

    Example:
        >>> model = fastcnn.create_model("resnet20")
        >>> torch.save(model.state_dict(), "weights.pth")
        >>> fastcnn.models.load_weights(model, "weights.pth")
        Loaded(adapted=[], untouched=[], ignored=[])
    """
    if not isinstance(model, Network):
        raise TypeError(f"model: expected a network of fastcnn.models, got {type(model).__name__}")
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError(
            "model: its weights are on the meta device, where nothing can be loaded; call "
            "model.to_empty(device=...) first"
        )
    given = {model.rename(key): value for key, value in read_state_dict(path).items()}
    ignored = [k for k in given if k not in own and _below(k, model.auxiliary)]
    for key in ignored:
        del given[key]
    problems = _unmatched(own, given, path)

    adapted, untouched = [], []
    first = next((f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    for key in [key for key in own if key in given]:
        value, shape = given[key], own[key].shape
        if value.ndim == 4 and len(shape) == 2:  # timm's convolutions for linear layers
            value = given[key] = value.flatten(1)
        if value.shape == shape:
            continue
        if key == first and adapt_in_chans and value[:, 0].shape == own[key][:, 0].shape:
            given[key] = adapt_input_channels(value, shape[1])
            adapted.append(key)
        elif _below(key, model.heads) and adapt_num_classes and value.shape[1:] == shape[1:]:
            del given[key]
            untouched.append(key)
        else:
            problems.append(
                f"{key} is {list(value.shape)}, expected {list(shape)}{_hint(key, first, model)}"
            )
    if problems:
        raise ValueError(
            f"weights: {path} does not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    model.load_state_dict(given, strict=False)
    if untouched:
        warnings.warn(
            f"weights: {path} has other classes: {', '.join(untouched)} stay initialised",
            stacklevel=2,
        )
    return Loaded(adapted, untouched, ignored)


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """(c_out, c_in, kh, kw) -> (c_out, channels, kh, kw): the same response to a grey image.

    One channel: the sum. More: the channels in turn, times c_in / channels. As timm's
    adapt_input_conv.
    """
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    c_in = weight.shape[1]
    repeated = weight.float().repeat(1, math.ceil(channels / c_in), 1, 1)[:, :channels]
    return (repeated * (c_in / channels)).to(weight.dtype)


def _unmatched(own: dict[str, Tensor], given: dict[str, Tensor], path: object) -> list[str]:
    """Missing and unexpected keys in words; none in common is another network."""
    if not own.keys() & given.keys():
        raise ValueError(
            f"weights: no key of {path} matches: it has {_listed(list(given))}; "
            f"expected {_listed(list(own))}"
        )
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in own]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    return problems + ([f"unexpected {', '.join(unexpected)}"] if unexpected else [])


def _hint(key: str, first: str, model: Network) -> str:
    if key == first:
        return " (in_chans= given explicitly adapts it)"
    if _below(key, model.heads):
        return " (num_classes= given explicitly starts a new classifier)"
    return ""


def _below(key: str, layers: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{layer}.") for layer in layers)


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
