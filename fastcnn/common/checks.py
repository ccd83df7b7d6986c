"""What every op asks of its arguments, in the user's words.

These checks run before dispatch, so that a mistake is a TypeError or ValueError that names the
argument, what was expected and what came. Memory is protected once more below, in C++.
"""

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def check_choice(op: str, name: str, value: object, choices: Collection[str]) -> None:
    """Check that an option is one of several."""
    if not isinstance(value, str) or value not in choices:
        plain = value is None or isinstance(value, (str, int, float))  # a tensor would fill pages
        got = repr(value) if plain else one_of(type(value))
        raise ValueError(f"{op}: {name}: expected one of {', '.join(choices)}, got {got}")


def one_of(cls: type) -> str:
    """Return a class's name behind its article."""
    name = cls.__name__
    return f"an {name}" if re.match("(?!one|unet|uni)[aeiou]", name, re.IGNORECASE) else f"a {name}"


def check_flag(op: str, name: str, value: object) -> None:
    """Check True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected True or False, got {type(value).__name__}")


def memory_format_of(x: Tensor) -> torch.memory_format | None:
    """channels_last or contiguous_format where x is dense in that order, else None.

    A tensor with 1x1 images or a single channel is dense in both orders; it then counts as
    contiguous_format, which describes the same bytes.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 4:
        # Of symbolic sizes torch 2.11 says no to both, as one of them might be 1.
        (_, c, h, w), strides = x.shape, x.stride()
        if strides[1] == 1 and strides[3] == c and strides[2] == c * w and strides[0] == c * h * w:
            return torch.channels_last
        if strides[3] == 1 and strides[2] == w and strides[1] == h * w and strides[0] == c * h * w:
            return torch.contiguous_format
    return None


def is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch's convolution takes [n, c, h, w] for channels_last: its own rule, by strides.

    Unlike memory_format_of() it tells of a 1x1 filter too which of both it was made as.
    """
    (_, c, h, w), (s_n, s_c, s_h, s_w) = t.shape, t.stride()
    return s_w >= s_c * c and s_h >= s_w * w and s_n >= s_h * h != s_c > 0


def as_convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Return x in the layout in which PyTorch's convolution of it answers.

    That is channels_last as soon as x or the weight is, and PyTorch copies x then, too.
    """
    if x.device.type != "cpu" or not is_channels_last(weight):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def check_dense(op: str, name: str, x: Tensor) -> None:
    """Check a dense tensor of a floating type and any rank on a device with kernels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name}: expected float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if x.dim() == 4:
        if memory_format_of(x) is None:
            raise ValueError(
                f"{op}: {name}: expected a dense NCHW or channels_last tensor, got sizes "
                f"{list(x.shape)} with strides {list(x.stride())}; call {name}.contiguous() or "
                f"{name}.contiguous(memory_format=torch.channels_last) first"
            )
    elif not x.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected a contiguous tensor, got sizes {list(x.shape)} with strides "
            f"{list(x.stride())}; call {name}.contiguous() first"
        )
    check_device(op, name, x)


def check_image(op: str, name: str, x: Tensor) -> None:
    """Check a dense batch of images [n, c, h, w] of a floating type on a device with kernels."""
    if isinstance(x, Tensor) and x.dtype in FLOATS and x.dim() != 4:
        raise ValueError(
            f"{op}: {name}: expected 4 dimensions [n, c, h, w], got {x.dim()}: {list(x.shape)}"
        )
    check_dense(op, name, x)


def check_device(op: str, name: str, x: Tensor) -> None:
    """Check that there are kernels for the tensor's device and dtype."""
    kind = x.device.type
    if kind in ("cpu", "meta"):
        return
    if kind != "cuda":
        raise ValueError(f"{op}: {name}: expected a CPU or CUDA tensor, got one on {x.device}")
    from fastcnn import _C

    if not _C.cuda_version:
        raise ValueError(
            f"{op}: {name}: expected a CPU tensor, since this fastcnn was built without CUDA, "
            f"got one on {x.device}; rebuild it where nvcc is, with FASTCNN_CUDA=ON"
        )
    if x.dtype is torch.float64:
        raise TypeError(
            f"{op}: {name}: expected float32, bfloat16 or float16 on CUDA, got {x.dtype}"
        )


def check_image_of(op: str, name: str, t: Tensor, sizes: Sequence[int], x: Tensor) -> None:
    """Check a dense tensor of these sizes, of x's dtype and device, x being checked."""
    (check_image if x.dim() == 4 else check_dense)(op, name, t)
    if list(t.shape) != list(sizes):
        raise ValueError(f"{op}: {name}: expected sizes {list(sizes)}, got {list(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name}: expected {x.dtype} as the input, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name}: expected device {x.device}, got {t.device}")


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Check a tensor of x's sizes, dtype, device and memory format."""
    check_image_of(op, name, t, x.shape, x)
    check_format(op, name, t, memory_format_of(x))


def check_format(op: str, name: str, t: Tensor, expected: torch.memory_format | None) -> None:
    """Check the input's memory format; None: any."""
    if expected is not None and not t.is_contiguous(memory_format=expected):
        raise ValueError(
            f"{op}: {name}: expected the input's memory format {expected}, got strides "
            f"{list(t.stride())}; call {name}.contiguous(memory_format={expected}) first"
        )


def in_format_of(t: Tensor, x: Tensor) -> Tensor:
    """Return t in x's memory format.

    For what two convolutions made of one input: an input of a single channel is dense in both
    orders, and each convolution then chooses by its weight.
    """
    return t.contiguous(memory_format=memory_format_of(x) or torch.contiguous_format)


def check_channels(op: str, name: str, t: Tensor, channels: int, x: Tensor) -> None:
    """Check one number a channel, in x's dtype or, beside a half x, in float32."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected a Tensor, got {type(t).__name__}")
    if t.shape != (channels,):
        raise ValueError(
            f"{op}: {name}: expected {channels} numbers, one for each channel, "
            f"got sizes {list(t.shape)}"
        )
    check_parameter_type(op, name, t, x)


def check_parameter_type(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Check a parameter's dtype, x's or, of a half x, float32, and its device."""
    if t.dtype != x.dtype and not (x.dtype in HALVES and t.dtype is torch.float32):
        expected = f"{x.dtype} or torch.float32" if x.dtype in HALVES else f"{x.dtype}"
        raise TypeError(
            f"{op}: {name}: expected {expected} beside an input of {x.dtype}, got {t.dtype}"
        )
    if t.device != x.device:
        raise ValueError(f"{op}: {name}: expected device {x.device}, got {t.device}")


def check_eps(op: str, eps: float, of_batch: bool = True) -> None:
    """Check what is added to a variance: at least 0; above, as in torch, beside a batch's own."""
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps: expected a number, got {type(eps).__name__}")
    if not (eps > 0 or (eps == 0 and not of_batch)):
        least = "a number above 0" if of_batch else "at least 0"
        raise ValueError(f"{op}: eps: expected {least}, got {eps}")


def check_parameters(
    op: str,
    sizes: Sequence[int],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    prefix: str = "",
    is_part: bool = False,
) -> None:
    """Check a batch norm of an input of these sizes, with x's dtype and device.

    prefix: what the caller's user knows weight and bias as, "bn_" for "bn_weight".
    is_part: other processes hold more of the batch, so that one value a channel may be enough.
    """
    check_eps(op, eps, training)
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"{op}: momentum: expected a number, got {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum: expected a number from 0 to 1, got {momentum}")
    named = {
        f"{prefix}weight": weight,
        f"{prefix}bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, t in named.items():
        if t is not None:
            check_channels(op, name, t, sizes[1], x)
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        # Updated in place: a copy would lose the update.
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{op}: {name}: expected a dense vector, got strides {t.stride()}")
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name}: expected no requires_grad, got it: it has no gradient")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: {missing}: expected a Tensor as its partner is one, got None")
    if running_mean is None and not training:
        raise ValueError(f"{op}: running_mean: expected a Tensor where training=False, got None")
    if training and not is_part and sizes[0] * sizes[2] * sizes[3] == 1:
        raise ValueError(
            f"{op}: input: expected more than 1 value per channel when training, "
            f"got sizes {list(sizes)}"
        )


def check_storage(op: str, **tensors: Tensor | None) -> None:
    """Check that nobody has shrunk the storage under a tensor, whose sizes do not show it."""
    for name, t in tensors.items():
        if t is None or t.numel() == 0:
            continue
        end = t.storage_offset() + 1
        if memory_format_of(t) is not None if t.dim() == 4 else t.is_contiguous():
            end += t.numel() - 1
        else:
            end += sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        if t.untyped_storage().nbytes() < end * t.element_size():
            raise ValueError(
                f"{op}: {name}: expected a storage of at least {end * t.element_size()} bytes, "
                f"got {t.untyped_storage().nbytes()}"
            )
        if t.data_ptr() == 0:
            raise ValueError(
                f"{op}: {name}: expected a tensor with memory, got sizes {list(t.shape)} without"
            )
