"""Compiled layers. Equal layers share one graph; the loss, norms and embeddings around them stay eager."""

from __future__ import annotations

import shutil
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from backends.torch.modules import Block
from spec.errors import UserError

SHAPES = 8
"""Shapes of batches that layers are compiled for; batches of further shapes run eagerly."""


def choose_compile(
    switch: str, device: torch.device, *, experts_move: bool = False, budget: bool = False
) -> tuple[bool, str]:
    """Whether layers are compiled, and why.

    `experts_move`: a layer's experts are on several ranks. `budget`: checkpointing by a budget needs it. Raises
    `UserError` where it is asked for and cannot be.
    """
    return decide(switch, device.type, missing(device.type), experts_move=experts_move, budget=budget)


def decide(switch: str, kind: str, absent: str | None, *, experts_move: bool, budget: bool) -> tuple[bool, str]:
    """Whether layers are compiled on a device of this type that lacks `absent`, and why."""
    if experts_move:
        absent = "rows that travel between ranks by counts (parallel.ep), which no graph holds"
    wanted = switch == "true" or budget
    if wanted and absent:
        asked = "compile: true" if switch == "true" else "memory.checkpointing: budget"
        raise UserError(f"{asked} is stopped by {absent} (compile false, memory.checkpointing selective)")
    if switch == "false":
        return False, "as asked"
    if wanted:
        return True, "as asked" if switch == "true" else "memory.checkpointing budget needs it"
    if absent:
        return False, f"stopped by {absent}"
    if kind in ("cuda", "xpu"):
        return True, "it pays on GPUs"
    return False, f"it takes a minute and gains little on {kind}; ask for it with --compile true in long runs"


def missing(kind: str) -> str | None:
    """What torch's compiler lacks on a device of this type, or none."""
    if kind in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        return None if has_triton() else "a missing Triton"
    if kind == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            compiler = get_cpp_compiler()
        except InvalidCxxCompiler:
            return "a missing C++ compiler (install g++ or clang++, or name one in CXX)"
        if shutil.which(compiler) is None:
            return f"a missing C++ compiler: {compiler} is not there (install it, or name another in CXX)"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "missing headers of Python (python3-dev)"
    return None


def compile_layer(block: Block) -> None:
    """Compile one layer as a single graph, for each shape anew. Its hooks stay outside."""
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    config.recompile_limit = max(
        config.recompile_limit, 16 * SHAPES
    )  # kinds of layers x shapes x with gradients or not
    block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]


class Shapes:
    """The shapes that layers are compiled for: the first ones that come."""

    def __init__(self) -> None:
        self._known: set[tuple[Any, ...]] = set()

    def stance(self, *shape: Any) -> Any:
        """Around a forward pass of this shape: compiled where it may be, else eager."""
        if shape in self._known or len(self._known) < SHAPES:
            self._known.add(shape)
            return nullcontext()
        return torch.compiler.set_stance("force_eager")
