"""A convolution's geometry: pairs of numbers, and the size of its output."""

from collections.abc import Sequence

Pair = tuple[int, int]


def pair(op: str, name: str, value: int | tuple[int, ...]) -> Pair:
    """Return one number for the height and one for the width, as torch.nn.functional takes them."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(numbers) not in (1, 2) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{op}: {name}: expected a whole number or a pair of them, got {value!r}")
    return numbers[0], numbers[-1]


def output_size(
    image: Pair, window: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, ...]:
    """Return the height and width of a convolution's output, or raise ValueError."""
    for name, pair, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    ):  # fmt: skip
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"conv2d: {name}: expected two numbers from {least} on, got {pair}")
    sides = zip(image, window, stride, padding, dilation, strict=True)
    sizes = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides)
    if min(sizes) < 1:
        raise ValueError(
            f"conv2d: weight: expected a window that fits, got {tuple(window)} with "
            f"dilation={dilation}, larger than the padded image: {image} with padding={padding}"
        )
    return sizes
