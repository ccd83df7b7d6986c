"""A convolution's geometry: how its window moves, and the size of its output."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple, NoReturn

INTEGERS = (int, Integral)  # NumPy's, too, as PyTorch takes them
Pair = tuple[int, int]
Pool = tuple[Pair, Pair, Pair]  # a pooling: kernel, stride, padding


class ConvGeometry(NamedTuple):
    """The arguments of torch.nn.functional.conv2d that are not tensors, height before width."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def output_size(self, image: Sequence[int], window: Sequence[int]) -> list[int]:
        """Return the height and width of the output of an image [h, w] under a window [kh, kw]."""
        return output_size(image, window, self.stride, self.padding, self.dilation)


def pair(op: str, name: str, value: int | tuple[int, ...]) -> Pair:
    """Return one number for the height and one for the width, as torch.nn.functional takes them."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(numbers) not in (1, 2) or not all(isinstance(number, INTEGERS) for number in numbers):
        raise ValueError(f"{op}: {name}: expected an integer or a pair of them, got {value!r}")
    return int(numbers[0]), int(numbers[-1])


def padding_of(conv: Any) -> Any:
    """Return a Conv2d's padding in numbers, None where they differ from side to side.

    "same" is half of what the kernel takes beyond a pixel, d (k - 1), on either side.
    """
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return 0, 0
    beyond = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return None if any(b % 2 for b in beyond) else tuple(b // 2 for b in beyond)


def refuse_window(
    op: str,
    sizes: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> NoReturn:
    """Raise of a convolution without an output that no geometry has these numbers, or none fits."""
    for name, numbers, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    ):  # fmt: skip
        if min(numbers) < least:
            raise ValueError(
                f"{op}: {name}: expected integers from {least} up, got {tuple(numbers)}"
            )
    raise ValueError(
        f"{op}: weight: expected a kernel that fits into the padded input, got kernel "
        f"{list(window)}, stride {tuple(stride)}, padding {tuple(padding)}, dilation "
        f"{tuple(dilation)} for an input of {list(sizes)}"
    )


def output_size(
    image: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> list[int]:
    """Return the sides of a convolution's or a pooling's output, below 1 where no window fits.

    floor((side + 2 padding - dilation (k - 1) - 1) / stride) + 1 each, as torch.nn.Conv2d has it.
    """
    sides = zip(image, window, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides]
