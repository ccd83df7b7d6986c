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
def _within_far(z):
    return tl.where(z < -FAR, -FAR, tl.where(z > FAR, FAR, z))


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


@triton.jit
def act_bwd(dy, z, ACT: tl.constexpr):
    """Return dy times the derivative at z; where it jumps, the one that PyTorch takes."""
    if ACT == RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACT == RELU6:
        dy = tl.where(z <= 0, 0.0, tl.where(z >= 6, 0.0, dy))
    elif ACT == LEAKY_RELU:
        dy = tl.where(z > 0, dy, dy * 0.01)
    elif ACT == SILU:
        value = _sigmoid(z)
        dy = dy * (value + _within_far(z) * (value * _sigmoid(-z)))
    elif ACT == GELU:
        near = _within_far(z)
        density = tl.exp(near * near * -0.5)
        dy = dy * (_normal_cdf(z) + near * density * 0.39894228040143267794)
    elif ACT == SIGMOID:
        dy = dy * (_sigmoid(z) * _sigmoid(-z))
    elif ACT == HARDSWISH:
        derivative = z * (1.0 / 3) + 0.5
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * derivative))
    return dy
