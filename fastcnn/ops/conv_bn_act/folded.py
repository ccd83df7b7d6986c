"""conv2d_folded: a convolution of modules in inference, its weights folded and packed once.

    y = act(batch_norm(conv2d(x)) + residual)          batch norm and residual are optional

A step of conv_bn_act (together.py: several as one call), with the same checks and the same bits,
but in two places: where a weight that is kept makes Winograd's products pay, and a sum written into
a residual that dies, which is another kernel's on processors without AVX2. That one folds the batch
norm into the weights at every call, and oneDNN lays them out anew; here both are kept:

    CPU, channels_last   the weight in oneDNN's layout, for each of the last sizes of x; as
                         winograd.py transforms it, in either layout, in float32: four times the
                         weight of float32, eight times that of half types; of a 1x1 convolution in
                         pointwise.py's panels; of a depthwise one, which is not oneDNN's, as it is
    CPU, NCHW            the folded weight: oneDNN's operator answers a packed one in channels_last
    CUDA                 the folded weight, for the plan that wants it folded

The modules are read at every call. What was kept goes where one of their tensors is another one,
has other memory (.to(), load_state_dict(assign=True), share_memory()) or was written to, which its
version counter tells (an optimizer's step, load_state_dict). Writes through tensor.data or a NumPy
view leave the counter as it is. On the CPU the values are compared for those: at each call every
vector of one number a channel, and one element of each filter, the next call another one. Edits of
a whole channel or filter are seen at once; of single elements after at most as many calls as a
filter has. Elsewhere nothing is read back, and refresh() is for those. Tensors made in inference
mode have no counter, and what is not dense is not compared: they are folded at every call. So is
what torch.compile, torch.export, torch.func, subclasses of Tensor and calls that want a gradient
see: all these by conv_bn_act's own way.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from fastcnn.common.activation import ACT_NUMBER, act_number
from fastcnn.common.autocast import autocast_dtype, cast
from fastcnn.common.checks import as_convolved, check_image
from fastcnn.common.conv_geometry import padding_of
from fastcnn.ops.conv2d.onednn import (
    convolve_onednn,
    convolving_onednn,
    folds,
    packed_onednn,
    residual_beside,
    weight_type,
)
from fastcnn.ops.conv2d.pointwise import by_panels, panels, pointwise_conv2d
from fastcnn.ops.conv2d.winograd import KEPT, by_winograd, conv2d_winograd, transformed
from fastcnn.ops.conv_bn_act.inference import folded, norm_of_step
from fastcnn.ops.conv_bn_act.inference_candidates import convolve_planned
from fastcnn.ops.conv_bn_act.interface import OP, conv_bn_act
from fastcnn.ops.conv_bn_act.problem import is_planned
from fastcnn.ops.conv_bn_act.step import ConvBnActBlock, ConvBnActStep, StepSettings
from fastcnn.ops.conv_bn_act.validate import check_block
from fastcnn.ops.conv_bn_act.weight_cache import (
    Attribute,
    Run,
    State,
    Tensors,
    attributes_of,
    is_comparable,
    parameter_of,
)

_PLAIN = (Tensor, nn.Parameter)
OF_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
_OF_NORM = ("training", "running_mean", "running_var", "weight", "bias", "eps")


class FoldedConv2d:
    """``act(norm(conv(x)) + residual)`` of modules in evaluation, with weights folded once.

    x is [n, c, h, w] as :func:`fastcnn.functional.conv_bn_act` takes it, a residual has the
    output's sizes, dtype and layout. With residual_dies nobody reads the residual afterwards, and y
    may be written into its memory. A copy and a pickle keep nothing.

    Args:
        conv: a Conv2d with padding of both sides alike and padding_mode="zeros".
        norm: the BatchNorm2d behind it, or None.
        act: "none", "relu", "relu6", "leaky_relu", "silu", "gelu", "sigmoid" or "hardswish".

    Raises:
        ValueError: another padding, and in a call a batch norm that uses the batch's statistics.
        TypeError, ValueError: in a call, what conv_bn_act refuses.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, act: str = "none"
    ) -> None:
        act_number(OP, act)
        if conv.padding_mode != "zeros" or padding_of(conv) is None:
            raise ValueError(
                f"{OP}: expected padding of both sides alike with padding_mode='zeros', got "
                f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r}"
            )
        self.conv, self.norm, self.act = conv, norm, act
        self._state: State | None = None

    def refresh(self) -> None:
        """Fold anew at the next call."""
        self._state = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldedConv2d, (self.conv, self.norm, self.act)

    def __repr__(self) -> str:
        sizes = 0 if self._state is None else len(self._state.runs)
        return f"FoldedConv2d({self.conv}, {self.norm}, act={self.act!r}, kept for {sizes} inputs)"

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, residual_dies: bool = False
    ) -> Tensor:
        """Return act(norm(conv(x)) + residual)."""
        dtype = autocast_dtype(x)
        x, residual = cast(x, dtype), cast(residual, dtype)
        found = self.prepare(x, residual, dtype)
        if found is None:
            return self._without_cache(x, residual)
        return found[1](x, residual, residual_dies)

    def prepare(
        self, x: Tensor, residual: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[State, Run] | None:
        """Return what runs inputs like these, and for how long it may; None where nothing is kept.

        dtype: autocast's, which they are of, None where it is off.
        """
        tensors, numbers = self.read()
        state = self.state_for(x, residual, tensors, numbers)
        if state is None:
            return None
        layouts = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
        key = (x.shape, x.dtype, x.device, dtype, layouts)
        known = state.runs.get(key)
        if known is None:
            known = self._keep(state, key, x, dtype, tensors)
        run, sizes = known
        if residual is not None and (
            residual.dtype is not x.dtype
            or residual.device != x.device
            or list(residual.shape) != sizes
        ):
            return None  # _without_cache says so
        return state, run

    def attributes(self) -> list[Attribute] | None:
        """Return what read() reads, as it is now; None where that is not told by identity."""
        conv = attributes_of(self.conv, OF_CONV)
        if conv is None or self.norm is None:
            return conv
        norm = attributes_of(self.norm, _OF_NORM)
        return None if norm is None else conv + norm

    def keeps(self, state: State) -> Attribute:
        """Return what tells by identity that neither refresh() nor another state came since."""
        return vars(self), "_state", state

    def state_for(
        self, x: Tensor, other: Tensor | None, tensors: Tensors, numbers: tuple[Any, ...]
    ) -> State | None:
        """Return what is kept for the modules as they are, None where nothing can be."""
        images = (x,) if other is None else (x, other)
        if torch.compiler.is_compiling() or not is_plain_inference(images):
            return None
        if not may_be_kept(tensors) or not (folds(x) or is_planned(x)) or x.numel() == 0:
            return None
        state = self._state
        if state is None or not state.is_of(tensors, numbers):
            state = State(OP, tensors, numbers) if is_comparable(tensors) else None
            self._state = state
        return state

    def read(self) -> tuple[Tensors, tuple[Any, ...]]:
        """Return the modules' tensors and numbers, as they are now."""
        conv, norm = self.conv, self.norm
        numbers = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if norm is None:
            return self.tensors(), numbers
        of_batch = norm.training and isinstance(norm, _BatchNorm)  # not torchvision's frozen one
        if of_batch or norm.running_mean is None:
            raise ValueError(
                f"{OP}: expected a batch norm in evaluation with running statistics, which are "
                f"folded into the convolution, got {norm} with training={norm.training}"
            )
        return self.tensors(), (*numbers, norm.eps)

    def tensors(self) -> Tensors:
        """Return the modules' tensors, as they are now."""
        weights = (parameter_of(self.conv, "weight"), parameter_of(self.conv, "bias"))
        norm = self.norm
        if norm is None:
            return (*weights, None, None, None, None)
        affine = (parameter_of(norm, "weight"), parameter_of(norm, "bias"))
        return (*weights, norm.running_mean, norm.running_var, *affine)

    def step(self, tensors: Tensors) -> ConvBnActStep:
        """Return the step, without a batch norm with one that changes nothing, not a bit."""
        weight, bias, mean, var, bn_weight, bn_bias = tensors
        assert weight is not None
        if mean is None:
            dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
            mean = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device)
            var = torch.ones_like(mean)
        conv, eps = self.conv, 0.0 if self.norm is None else self.norm.eps
        return ConvBnActStep(
            weight, bias, conv.stride, padding_of(conv), conv.dilation, conv.groups,  # type: ignore[arg-type]
            mean, var, bn_weight, bn_bias, eps=eps, act=self.act,
        )  # fmt: skip

    def _without_cache(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Run it with nothing kept."""
        return conv_bn_act(x, [self.step(self.read()[0])], residual, "default")

    def _keep(
        self, state: State, key: Any, x: Tensor, dtype: torch.dtype | None, tensors: Tensors
    ) -> tuple[Run, list[int]]:
        """Check, and make what inputs like x run."""
        check_image(OP, "input", x)
        step = self.step(tensors)
        block = check_block(OP, ConvBnActBlock([step]), x, list(x.shape), dtype, "default", False)
        image = as_convolved(x, step.weight)
        run = self._run(state, image, step, block.steps[0].settings)
        if image is not x:
            inner = run

            def run(x: Tensor, residual: Tensor | None, dies: bool) -> Tensor:
                return inner(x.contiguous(memory_format=torch.channels_last), residual, dies)

        return state.keep(key, run, block.output)

    def _run(self, state: State, x: Tensor, step: ConvBnActStep, s: StepSettings) -> Run:
        if is_planned(x):
            return lambda x, residual, _: convolve_planned(x, step, s, residual, False, state.kept)
        norm, g = norm_of_step(step), s.conv
        tensors = step.weight, step.conv_bias, norm
        if by_panels(x, step.weight, g):
            w, bias = state.kept(in_panels, *tensors, torch.float32)
            c_out = len(bias)
            return lambda x, residual, _: pointwise_conv2d(
                x, w, c_out, bias, step.act, residual_beside(x, residual, False)
            )
        if by_winograd(x, step.weight, g, KEPT):  # one for all sizes, four times the weight
            u, bias = state.kept(_transformed, *tensors, torch.float32)
            padding, act = g.padding, ACT_NUMBER[step.act]
            return lambda x, residual, _: conv2d_winograd(
                x, u, bias, padding, act, residual_beside(x, residual, False)
            )
        dtype = weight_type(x, step.weight, g)
        folded_weight, bias = folded(*tensors, dtype)
        weight = packed_onednn(x, folded_weight, g)
        if weight is folded_weight:  # for other sizes, too
            weight, bias = state.kept(folded, *tensors, dtype)
        alone = convolving_onednn(x, weight, bias, g, step.act)

        def run(x: Tensor, residual: Tensor | None, dies: bool) -> Tensor:
            if residual is None:
                return alone(x)
            into = dies and _may_be_written(residual, x)
            return convolve_onednn(x, weight, bias, g, step.act, residual, False, into)

        return run


def in_panels(*how: Any) -> tuple[Tensor, Tensor]:
    """Return folded()'s weight, of a 1x1 convolution, in panels, and its bias."""
    weight, bias = folded(*how)
    return panels(weight), bias


def _transformed(*how: Any) -> tuple[Tensor, Tensor]:
    weight, bias = folded(*how)
    return transformed(weight), bias


def is_plain_inference(images: Iterable[Tensor]) -> bool:
    """Whether these are tensors with data, and no gradient is required of them."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    grads = torch.is_grad_enabled()
    return not any(type(t) not in _PLAIN or (grads and t.requires_grad) for t in images)


def may_be_kept(tensors: Iterable[Tensor | None]) -> bool:
    """Whether parameters have a version counter, and no gradient is required of them."""
    grads = torch.is_grad_enabled()
    return not any(
        type(t) not in _PLAIN or t.is_inference() or (grads and t.requires_grad)
        for t in tensors
        if t is not None
    )


def _may_be_written(residual: Tensor, x: Tensor) -> bool:
    """Whether a convolution of x may write into the residual."""
    if residual.is_inference() and not torch.is_inference_mode_enabled():
        return False  # PyTorch refuses
    return residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
