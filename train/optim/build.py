"""AdamW with parameter groups by role, the learning rate over the steps, and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spec.config import Spec
from spec.params import params
from train.config import Optimizer


def build(decoder: nn.Module, spec: Spec, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over a decoder's parameters; who decays is decided by the parameter's role in the spec."""
    decaying = {
        "linear": True,
        "experts": True,
        "router": True,
        "embedding": config.decay_embeddings,
        "gain": config.decay_norms,
        "bias": config.decay_norms,
        "sinks": config.decay_norms,
    }
    roles = {p.name: p.role for p in params(spec)}
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in decoder.named_parameters():
        groups[decaying[roles[name]]].append(p)
    decays = ((True, config.weight_decay), (False, 0.0))
    chosen: list[dict[str, Any]] = [{"params": groups[k], "weight_decay": d} for k, d in decays if groups[k]]
    # One kernel for all parameters, where the device has it.
    fused = next(decoder.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(chosen, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """The rate of step 1..steps: linear from 0 to `peak` over `warmup` steps, then half a cosine to `final * peak`
    (Loshchilov & Hutter 2017)."""
    if step <= warmup:
        return peak * step / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The global 2-norm of all gradients, over all shards, as a scalar tensor."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = getattr(norm, "full_tensor", None)  # a sharded model's norm is a partial sum of squares on each rank
    return whole() if whole is not None else norm


def clip(parameters: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale all gradients so that their global norm is at most `limit`."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
