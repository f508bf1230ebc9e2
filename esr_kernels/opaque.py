"""What torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, not traced by torch.compile: nothing in it gains from that."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper
