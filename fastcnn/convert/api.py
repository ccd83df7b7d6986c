"""convert and revert: which modules of a model get a class of their own."""

import warnings
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from fastcnn.common.checks import check_choice, check_flag
from fastcnn.convert.codegen.fit import HAS_CUDA
from fastcnn.convert.converted import Converted, discard
from fastcnn.convert.options import Options, check_module
from fastcnn.convert.parts import Parts, apply, decide, parts_of
from fastcnn.convert.rows import left, rows_of, table
from fastcnn.convert.summary import infer_fuses
from fastcnn.ops.conv_bn_act.step import Memory, check_memory

Model = TypeVar("Model", bound=nn.Module)
Mode = Literal["train", "infer"]
Backend = Literal["auto", "cpu", "cuda"]


def convert(
    model: Model,
    mode: Mode = "train",
    backend: Backend = "auto",
    strict: bool = False,
    memory: Memory = "auto",
) -> Model:
    """Let fused kernels run what of a model they can, in place, and return it.

    Each module's forward is traced (torch.fx) and what the trace holds of these runs as one call:

        conv (+ bias) - BatchNorm - activation - max pooling, and chains of them, whose activations
        backward recomputes instead of saving; with an addition before the last activation
        BatchNorm, GroupNorm, InstanceNorm, LayerNorm2d - activation
        interpolate or Upsample, and torch.cat([skip, it], 1) behind it
        dropout

    A forward that does not trace stays as it is, and its children are converted by themselves.
    Parameters, buffers, state_dict keys, hooks, module names, flags and isinstance stay what they
    are; :func:`revert` gives back the model as it was. ``fastcnn.report(model)`` shows what was
    fused and what was not, with the reason; ``fastcnn.verify(model, x)`` compares.

    A converted module compares itself at each call with what was traced. Where hooks, children or
    attributes have changed it warns once and runs as written. Dropout draws other masks than
    PyTorch from the same seed. A fused call is differentiable once.

    Args:
        model: any, on any device; where it is itself converted in this way already, nothing
            happens.
        mode: "train", for training and evaluation; or "infer": in evaluation each convolution's
            weights are kept with the batch norm folded in and in the layout that its kernel wants,
            as long as nobody changes them, which costs their memory once more; convolutions
            without a batch norm are fused with their activation too. It trains as well.
        backend: "auto": the kernels of the device that a call's input is on, and PyTorch where
            there are none for it, which report says. "cpu" or "cuda": those of that device, and an
            error where they cannot run a call.
        strict: raise where anything convertible was not converted.
        memory: what a chain saves for backward: "full", "default", "low" or "lowest", see
            fastcnn.functional.conv_bn_act_blocks; "auto" is the fastest of them on the device of a
            call's input, which report names.

    Returns:
        The model itself.

    Raises:
        TypeError: a model that is no Module, or a ScriptModule; a strict that is no bool.
        ValueError: an unknown mode, backend or memory; a backend that this build does not have; a
            lazy layer, as nn.LazyConv2d, that has not seen a batch yet; with strict=True, what was
            not converted, as report's table; the model is then left as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> fastcnn.convert(model)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
        >>> print(model)
        Sequential(
          fused: conv-bn
        ...
    """
    check_module("convert", model)
    check_choice("convert", "mode", mode, get_args(Mode))
    check_choice("convert", "backend", backend, get_args(Backend))
    check_flag("convert", "strict", strict)
    check_memory("convert", memory)
    if backend == "cuda" and not HAS_CUDA:
        raise ValueError(
            "convert: backend: expected 'auto' or 'cpu', since this fastcnn was built without "
            "CUDA, got 'cuda'; rebuild it where nvcc is, with FASTCNN_CUDA=ON"
        )
    options = Options(mode, backend, memory)
    if _is_converted(model, options):
        _refuse_what_is_left(model, parts_of(model), strict)
        return model
    parts = decide(model, options)
    _refuse_what_is_left(model, parts, strict)
    if not _give_classes(model, parts, options):
        why = f'it holds nothing that mode="{mode}" fuses'
        if mode == "train" and infer_fuses(parts):
            why = 'for inference mode="infer" fuses its convolutions with their activations'
        elif rows_of(model, parts):
            why = "fastcnn.report(model) says why"
        message = f"fastcnn.convert: nothing in {type(model).__name__} runs fused: {why}"
        warnings.warn(message, stacklevel=2)
    return model


def convert_built(model: Model, memory: Memory) -> Model:
    """Convert a model of fastcnn.models, without a warning where nothing of it is fused."""
    options = Options("train", "auto", memory)
    _give_classes(model, decide(model, options), options)
    return model


def _refuse_what_is_left(model: nn.Module, parts: Parts, strict: bool) -> None:
    unfused = left(rows_of(model, parts)) if strict else []
    if unfused:
        raise ValueError(
            "convert: strict=True: expected all that is convertible to be converted, got\n"
            + "\n".join(table(unfused))
        )


def _give_classes(model: nn.Module, parts: Parts, options: Options) -> bool:
    """Convert a model as it was decided; says whether anything of it is fused."""
    revert(model)
    apply(parts)
    found = [m for m in model.modules() if isinstance(m, Converted)]
    _done[model] = WeakSet(model.modules()), WeakSet(found), options
    return bool(found)


def revert(model: Model) -> Model:
    """Give a converted model back its own forwards, bit for bit what it was, and return it.

    Parameters, buffers and flags are those of now. A model that is not converted stays as it is.

    Args:
        model: any. Of a part of a converted model only calls of the part itself are given back: the
            model around it still runs it fused.

    Returns:
        The model itself.

    Raises:
        TypeError: a model that is no Module.

    Example:
        >>> model = fastcnn.create_model("resnet20")
        >>> "fused" in repr(model), "fused" in repr(fastcnn.revert(model))
        (True, False)
    """
    check_module("revert", model, scripted=True)
    _done.pop(model, None)
    for module in model.modules():
        if isinstance(module, Converted):
            discard(module)
    return model


# By converted model: the modules that were in it, those that were converted, what was asked for.
_done: WeakKeyDictionary[nn.Module, tuple[WeakSet[nn.Module], WeakSet[nn.Module], Options]]
_done = WeakKeyDictionary()


def _is_converted(model: nn.Module, options: Options) -> bool:
    """Whether a model is as its conversion with these options left it."""
    modules, found, asked = _done.get(model, (None, None, None))
    if asked != options or set(model.modules()) != set(modules or ()):
        return False
    converted: list[Any] = [m for m in model.modules() if isinstance(m, Converted)]
    made = [m._fastcnn_conversion for m in converted]
    same = set(converted) == set(found or ())
    return same and all(one.options == options and one.holds() for one in made)
