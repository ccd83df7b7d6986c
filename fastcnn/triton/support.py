"""What the Triton kernels take, and where they run; imports no Triton."""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def allows_tf32() -> bool:
    """Whether float32 may be multiplied as TF32.

    torch.backends.cudnn.allow_tf32 sets the same, but raises when read once convolutions and
    recurrent layers differ.
    """
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
