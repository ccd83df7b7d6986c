"""The activations, by the schema's number: csrc/common/activation.h in Triton's words."""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.common.activation import ACT_NUMBER

NONE, RELU, RELU6, LEAKY_RELU, SILU, GELU, SIGMOID, HARDSWISH = (
    tl.constexpr(number) for number in ACT_NUMBER.values()
)
FAR = tl.constexpr(1e4)  # beyond it the factors of silu and gelu are 0 or 1 in any type


@triton.jit
def _sigmoid(z):
    e = tl.exp(tl.where(z < 0, z, -z))  # of -|z|: nothing overflows
    large = 1 / (1 + e)
    return tl.where(z < 0, e * large, large)


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.70710678118654752440)


@triton.jit
def act_fwd(z, ACT: tl.constexpr):
    """Return act(z). A NaN comes through."""
    if ACT == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif ACT == RELU6:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == LEAKY_RELU:
        z = tl.where(z > 0, z, z * 0.01)
    elif ACT == SILU:
        z = tl.where(z < -FAR, -FAR, z) * _sigmoid(z)
    elif ACT == GELU:
        z = tl.where(z < -FAR, -FAR, z) * _normal_cdf(z)
    elif ACT == SIGMOID:
        z = _sigmoid(z)
    elif ACT == HARDSWISH:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) * (1.0 / 6)))
    return z
