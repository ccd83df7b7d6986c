"""A training step, or a network in inference, as a CUDA graph: one launch runs all its kernels.

Below some tens of images a GPU waits for Python: a bottleneck's forward and backward cost it some
0.4 ms, their kernels less. A graph replays what was launched once, with the same memory.

Data movement beside the function's own: each call copies its tensors into the graph's (read and
written once) and the graph's results out of it. Memory: what the function allocates stays the
graph's, apart from PyTorch's other memory, as long as the graph lives.
"""

import functools
from collections.abc import Callable, Sequence
from types import CellType, FunctionType, ModuleType, NoneType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from fastcnn.common.autocast import autocast_dtype

__all__ = ["graphed"]

Function = Callable[..., Any]


def graphed(function: Function, *example: Any, warmup: int = 3) -> Function:
    """Return what does as function does, and on a GPU replays it as a CUDA graph.

    function: a whole training step (forward, backward, optimizer), or a network. Its first calls
    run as they are, on a stream of their own: cuDNN, the planner and optimizers make up their minds
    there, and nothing is trained but what was asked for. The next call is captured, and from then
    on each call copies its inputs to where the graph reads them, replays it, and returns copies of
    its results. Dropout draws anew at each replay, batch norm's statistics and batches are counted.

    What a capture cannot see is refused rather than frozen: inputs of another size, type or device,
    other numbers among them, autocast or grad mode, hyper-parameters of the optimizers that step in
    it where those are Python's numbers; and another training flag, other memory or another
    requires_grad of the modules that the function names: itself, what it closes over, globals,
    attributes of its object. So schedules need a learning rate like
    ``torch.tensor(0.1, device="cuda")``. SGD then wants ``fused=True``, Adam and most others
    ``capturable=True``; with a GradScaler all want ``fused=True`` too, which hands its scale to the
    kernels. PyTorch's global switches (deterministic, TF32) stay what they were at the capture.

    Results are detached: backward belongs into the function. Where the optimizer stands outside,
    gradients are where the graph writes them after each call, also behind a ``zero_grad()``. Print,
    ``.item()`` and other Python of the function run while it is captured, and never again. One
    thread may call it at a time, on any stream.

    Args:
        function: takes these inputs; returns tensors, also in lists, tuples and dicts.
        example: its inputs: tensors that require no gradient, all on one device, numbers, strings
            and None, also in lists, tuples and dicts. It is not run.
        warmup: calls before the capture, at least 1.

    Returns:
        On the CPU the function itself.

    Raises:
        TypeError, ValueError: another function, example or warmup; in a call, inputs or settings
            that are not the capture's.
        RuntimeError: in the call that is captured, what CUDA cannot capture: reading a result on
            the CPU, a random number generator that is not PyTorch's own.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def step(x, target):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), target)
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(5)]
        >>> step = fastcnn.graphed(step, *batches[0])
        >>> losses = [float(step(x, target)) for x, target in batches]
    """
    if not callable(function):
        raise TypeError(f"graphed: function: expected a callable, got {type(function).__name__}")
    if type(warmup) is not int or warmup < 1:
        raise ValueError(f"graphed: warmup: expected an integer of 1 or more, got {warmup!r}")
    device = _device_of(pytree.tree_leaves(example))
    if device.type == "cpu":
        return function
    return GraphedFunction(function, example, warmup, CudaGraph(device))


def _device_of(leaves: Sequence[Any]) -> torch.device:
    """Return the device of all tensors."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, str, NoneType)):
            raise TypeError(
                "graphed: example: expected tensors, numbers, strings and None, got "
                f"{type(leaf).__name__}"
            )
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ValueError(
                "graphed: example: expected tensors that require no gradient, got "
                f"{_kind_of(leaf)}: what backward gives it would stay in the graph"
            )
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"graphed: example: expected tensors of one GPU or the CPU, got {found}")
    return devices.pop()


class Graph(Protocol):
    """What captures a function."""

    def run(self, function: Callable[[], Any]) -> Any:
        """Return function(), run where it will be captured."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Return the results that each replay fills anew."""

    def replay(self, fill: Callable[[], None], read: Callable[[], Any]) -> Any:
        """Fill the inputs, do it again, and return what is read of the results."""


class CudaGraph:
    """A CUDA graph, with the stream on which its function warms up."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], Any]) -> Any:
        """Return function(), run on the stream."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            result = function()
        now.wait_stream(self._stream)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(now)
        return result

    def capture(self, function: Callable[[], Any]) -> Any:
        """Return the results that each replay fills anew."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: a loader's that pins memory is no part of the graph. The stream
        # is entered by itself too: a capture that fails does not leave its own.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = function()
        self._graph = graph
        return result

    def replay(self, fill: Callable[[], None], read: Callable[[], Any]) -> Any:
        """Fill the inputs, launch it, and return what is read of the results.

        A call on another stream waits for the one before, whose memory it uses.
        """
        assert self._graph is not None
        now = torch.cuda.current_stream(self._device)
        now.wait_event(self._done)
        fill()
        self._graph.replay()
        result = read()
        self._done.record(now)
        return result


class _Settings(NamedTuple):
    """What a function may ask beside its inputs, and a graph has as it was."""

    grad_mode: bool
    inference_mode: bool
    autocast: torch.dtype | None
    training: list[bool]  # of the modules
    parameters: list[tuple[int, bool]]  # and buffers: where they lie, and requires_grad

    @classmethod
    def of(cls, modules: Sequence[nn.Module], leaves: Sequence[Any]) -> "_Settings":
        tensors = [
            t
            for module in modules
            for t in (*module._parameters.values(), *module._buffers.values())
            if t is not None
        ]
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            next(autocast_dtype(leaf) for leaf in leaves if isinstance(leaf, Tensor)),
            [module.training for module in modules],
            [(t.data_ptr(), t.requires_grad) for t in tensors],
        )


class _Watched:
    """What takes part while a function is captured: modules, optimizers, gradients.

    Not by hooks on all modules, with which a converted model runs unfused.
    """

    def __init__(self, function: Function) -> None:
        self.modules = _parts_of(function)
        self.numbers: list[_Numbers] = []
        self.gradients: list[_Gradient] = []

    def __enter__(self) -> "_Watched":
        self._hooks: list[Any] = [
            # Before the step: a schedule in the function changes them behind it.
            register_optimizer_step_pre_hook(
                lambda optimizer, *_: self.numbers.append(_Numbers(optimizer))
            )
        ]
        for p in {p for module in self.modules for p in module._parameters.values()}:
            if p is not None and p.requires_grad and p.is_leaf:
                self._watch(p, p.grad)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, p: Tensor, before: Tensor | None) -> None:
        def accumulated(p: Tensor) -> None:
            self.gradients.append(_Gradient(p, before is not None and p.grad is before))

        self._hooks.append(p.register_post_accumulate_grad_hook(accumulated))


def _parts_of(function: Any) -> list[nn.Module]:
    """Return the modules that a function names, and their parts.

    The function itself or what it belongs to, what it closes over, its globals and defaults, and
    what an object among these has as an attribute.
    """
    named: list[Any] = [function, getattr(function, "__self__", None)]
    while isinstance(function, functools.partial):
        named += [*function.args, *function.keywords.values()]
        function = function.func
    function = getattr(function, "__func__", function)
    if isinstance(function, FunctionType):
        cells = [cell for cell in function.__closure__ or () if cell != CellType()]  # an empty one
        named += [cell.cell_contents for cell in cells]
        named += [function.__globals__.get(name) for name in function.__code__.co_names]
        named += function.__defaults__ or ()
    attributes = [
        value
        for one in named
        if hasattr(one, "__dict__") and not isinstance(one, (nn.Module, ModuleType, type))
        for value in vars(one).values()
    ]
    modules = [one for one in (*named, *attributes) if isinstance(one, nn.Module)]
    return list(dict.fromkeys(part for module in modules for part in module.modules()))


class _Gradient:
    """A parameter's gradient, where a graph writes it; added: to what is there."""

    def __init__(self, parameter: Tensor, added: bool) -> None:
        self._parameter, self._added, self._grad = parameter, added, parameter.grad

    def check(self) -> None:
        """Refuse another memory where the graph adds to what is there."""
        if self._added and self._parameter.grad is not self._grad:
            raise ValueError(
                "graphed: expected gradients in the memory that they had at the capture, to which "
                "the graph adds: zero them by zero_grad(set_to_none=False), or in the function"
            )

    def put_back(self) -> None:
        """Let the parameter have it, after a zero_grad() that took it away."""
        self._parameter.grad = self._grad


class GraphedFunction:
    """A function, its first calls, and then its graph."""

    def __init__(self, function: Function, example: Any, warmup: int, graph: Graph) -> None:
        self._function, self._graph = function, graph
        self._calls_before = warmup
        leaves, self._form = pytree.tree_flatten(example)
        self._kinds = [_kind_of(leaf) for leaf in leaves]
        self._leaves: list[Any] = []  # what the graph reads
        self._settings: _Settings | None = None  # the capture's
        self._watched: _Watched  # the capture's, too
        self._result: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """Return the function's results, detached."""
        leaves = self._checked(inputs)
        if self._calls_before > 0:
            result = self._graph.run(lambda: self._function(*inputs))
            self._calls_before -= 1  # not where it has raised
            return pytree.tree_map_only(Tensor, Tensor.detach, result)
        if self._settings is None:
            self._capture(leaves)
        self._check_settings()
        result = self._graph.replay(
            lambda: self._fill(leaves),
            lambda: pytree.tree_map_only(Tensor, Tensor.clone, self._result),
        )
        for gradient in self._watched.gradients:
            gradient.put_back()
        return result

    def __repr__(self) -> str:
        state = "captured" if self._settings else f"{self._calls_before} calls before the capture"
        return f"graphed({self._function}, {state})"

    def _checked(self, inputs: Any) -> list[Any]:
        """Return the inputs' leaves, if they are as the example's."""
        leaves, form = pytree.tree_flatten(inputs)
        if form != self._form:
            expected = pytree.tree_unflatten(self._kinds, self._form)
            found = pytree.tree_map(_kind_of, inputs)
            raise TypeError(f"graphed: inputs: expected {expected} as in the example, got {found}")
        for at, (leaf, kind) in enumerate(zip(leaves, self._kinds, strict=True)):
            if (found := _kind_of(leaf)) != kind:
                raise ValueError(
                    f"graphed: input {at}: expected {kind} as in the example, got {found}: a graph "
                    "is of one kind of inputs; call the function itself, or make another graph"
                )
        return leaves

    def _fill(self, leaves: Sequence[Any]) -> None:
        for mine, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(leaf)

    def _capture(self, leaves: Sequence[Any]) -> None:
        self._leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
        inputs = pytree.tree_unflatten(self._leaves, self._form)
        caches = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()  # weights cast before would be numbers of the graph
        torch.set_autocast_cache_enabled(False)
        try:
            with _Watched(self._function) as self._watched:
                result = self._graph.capture(lambda: self._function(*inputs))
        except RuntimeError as error:
            raise RuntimeError(
                "graphed: expected a function that reads no result on the CPU, with SGD of "
                "fused=True and other optimizers of capturable=True, got, while it was captured: "
                f"{error}"
            ) from error
        finally:
            torch.set_autocast_cache_enabled(caches)
            torch.clear_autocast_cache()  # and the graph's, those of others
        self._result = pytree.tree_map_only(Tensor, Tensor.detach, result)
        self._settings = _Settings.of(self._watched.modules, leaves)

    def _check_settings(self) -> None:
        """Refuse what the graph has as it was when it was captured."""
        assert self._settings is not None
        found = _Settings.of(self._watched.modules, self._leaves)
        for name, then, now in zip(_Settings._fields, self._settings, found, strict=True):
            if then != now:
                said = "" if isinstance(then, list) else f" {then}, got {now}"
                raise ValueError(f"graphed: expected {name} as at the capture{said}")
        for numbers in self._watched.numbers:
            numbers.check()
        for gradient in self._watched.gradients:
            gradient.check()


class _Numbers:
    """An optimizer's hyper-parameters that are Python's numbers, and so the graph's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._then = optimizer, self._now(optimizer)

    def check(self) -> None:
        """Refuse others than at the capture."""
        if (now := self._now(self._optimizer)) == self._then:
            return
        groups = zip(self._then, now, strict=False)
        changed = [
            f"{name} of group {at}: expected {then[name]} as at the capture, got {found.get(name)}"
            for at, (then, found) in enumerate(groups)
            for name in then
            if found.get(name) != then[name]
        ]
        raise ValueError(
            f"graphed: {type(self._optimizer).__name__}: "
            f"{'; '.join(changed) or 'its parameter groups are others'}. A number is a constant of "
            "the graph: a tensor on the GPU can change"
        )

    @staticmethod
    def _now(optimizer: Optimizer) -> list[dict[str, Any]]:
        return [
            {
                # A tensor on the CPU is read while the kernels are launched.
                name: value.item() if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name != "params" and not (isinstance(value, Tensor) and value.is_cuda)
            }
            for group in optimizer.param_groups
        ]


def _kind_of(leaf: Any) -> str:
    """Return what an input must be like: a tensor's kind, else what it is."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    sizes = "x".join(map(str, leaf.shape)) or "a scalar"
    kind = f"{sizes} {str(leaf.dtype).removeprefix('torch.')} on {leaf.device}"
    return f"{kind}, which requires a gradient" if leaf.requires_grad else kind
