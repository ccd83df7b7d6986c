"""constant_result: torch.compiler.assume_constant_result, without what that imports."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """Let torch.compile call the function while it traces, and keep the result as a constant.

    torch's decorator sets this attribute and does nothing else (2.0 to 2.13; a test compares), but
    imports torch._dynamo for it: 888 of the 1,010 modules that `import fastcnn` added to torch's.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
