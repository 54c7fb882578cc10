"""Activation checkpointing: what the backward pass computes again rather than keeps.

Only a layer's class changes, so parameters keep their canonical names and sharding, tensor parallelism and compiling
see the layers that they know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from backends.torch.modules import Block
from train.config import Memory

SAVED: dict[str, tuple[str, ...]] = {
    "matmul": ("mm", "addmm", "_grouped_mm", "_scaled_mm"),
    "attention": (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math_for_mps",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
}
"""Operators of `torch.ops.aten` by what `memory.save` calls them. Batched products are not among them: those of the
reference attention hold scores."""


class Recomputed(Block):
    """A layer that keeps its input and computes the rest again, all but the results of the operators in `saved`."""

    saved: tuple[Any, ...]

    def forward(self, ops: Any, x: Tensor, step: Any, rotation: Any, cache: Any = None) -> tuple[Tensor, Any]:
        """[B, T, D] -> [B, T, D], and the layer's cache."""
        plain = super().forward
        if cache is not None or not torch.is_grad_enabled():
            return plain(ops, x, step, rotation, cache)

        def run(x: Tensor) -> Tensor:
            return plain(ops, x, step, rotation, None)[0]

        how: dict[str, Any] = {"context_fn": functools.partial(_contexts, self.saved)} if self.saved else {}
        return checkpoint(run, x, use_reentrant=False, **how), None  # type: ignore[return-value]


def _contexts(saved: tuple[Any, ...]) -> Any:
    return create_selective_checkpoint_contexts(functools.partial(_policy, saved))


def _policy(saved: tuple[Any, ...], ctx: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


def operators(names: tuple[str, ...]) -> tuple[Any, ...]:
    """The operators that selective checkpointing keeps, as far as this build of torch has them."""
    out: list[Any] = []
    for name in names:
        out += [getattr(torch.ops.aten, op).default for op in SAVED[name] if hasattr(torch.ops.aten, op)]
    if "attention" in names:
        import_module("torch.nn.attention.varlen")  # registers the operator
        out += [torch.ops.torch_attn._varlen_attn.default, torch.ops.higher_order.flex_attention]
    return tuple(out)


def recomputing(memory: Memory) -> Callable[[Block], None]:
    """What to do to each layer, first to last. A budget is spent while compiling: it is set for this process."""
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = memory.budget if memory.checkpointing == "budget" else 1.0
    saved = operators(memory.save) if memory.checkpointing == "selective" else ()
    seen = 0

    def wrap(block: Block) -> None:
        nonlocal seen
        seen += 1
        if memory.checkpointing in ("full", "selective") and seen % memory.every == 0:
            block.__class__ = Recomputed
            block.saved = saved  # type: ignore[assignment]

    return wrap
