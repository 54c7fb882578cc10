"""What rows of the table of architectures ask of a spec: one check for each field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backends.mlx import rotary
from spec.config import Block, MoE, NoPosition, Norm, Spec

Check = Callable[[Spec, Block], bool]
"""Whether a field of a layer, or of the whole, has a value that a row takes."""


def window(s: Spec, b: Block) -> int | None:
    """A layer's window; one that no sequence of the spec leaves is none."""
    w = b.attention.window
    return None if w is None or w >= s.context else w


def windows(s: Spec) -> list[int | None]:
    """Of every layer."""
    return [window(s, b) for b in s.layers]


def same_eps(s: Spec, n: Norm | None) -> bool:
    return n is None or n.eps == s.layers[0].norm.eps


def qk_norm(over: str) -> Check:
    def check(s: Spec, b: Block) -> bool:
        n = b.attention.qk_norm
        return n is not None and n.over == over and n.kind == "rmsnorm" and not n.bias and same_eps(s, n)

    return check


def square(s: Spec, b: Block) -> bool:
    a = b.attention
    return a.heads * (a.head_dim or 0) == s.width


def one_window(s: Spec, b: Block) -> bool:
    """mlx-lm's Llama wants a layer without a window, and one width for the others."""
    found = set(windows(s))
    return None in found and len(found) <= 2


def period(s: Spec) -> int:
    """n where every nth layer has no window and all others have the same; 0 where it is otherwise."""
    found = windows(s)
    n = found.index(None) + 1 if None in found else 0
    regular = n and all((w is None) == ((i + 1) % n == 0) for i, w in enumerate(found))
    return n if regular and len(set(found)) <= 2 else 0


def local_global(s: Spec, b: Block) -> bool:
    """Gemma 3: one plain table for windows, one that may be scaled for the others."""
    kinds: dict[bool, set[Any]] = {True: set(), False: set()}
    for layer in s.layers:
        kinds[window(s, layer) is None].add(layer.attention.position.model_dump_json())
    local = all(rotary.plain(x.attention) for x in s.layers if window(s, x) is not None)
    return local and all(len(k) <= 1 for k in kinds.values()) and all(_rotary(s, x) for x in s.layers)


def _rotary(s: Spec, b: Block) -> bool:
    return rotary.configured(s, b.attention) is not None


def uniform(check: Check) -> Check:
    """All layers have one table, and it is such a one."""
    return lambda s, b: len({x.attention.position.model_dump_json() for x in s.layers}) == 1 and check(s, b)


def gaps(s: Spec, b: Block) -> bool:
    """Layers have one table or do not rotate."""
    turning = [x for x in s.layers if not isinstance(x.attention.position, NoPosition)]
    return (
        bool(turning) and len({x.attention.position.model_dump_json() for x in turning}) == 1 and _rotary(s, turning[0])
    )


ANY: Check = lambda s, b: True  # noqa: E731


def attention_biases(s: Spec) -> bool:
    return any(any(b.attention.bias.model_dump().values()) for b in s.layers)


def mlp_biases(s: Spec) -> bool:
    return any(any(b.mlp.bias.model_dump().values()) for b in s.layers)


def no_bias(s: Spec, b: Block) -> bool:
    return not attention_biases(s)


def qkv_bias(s: Spec, b: Block) -> bool:
    return not b.attention.bias.o


def layernorm(s: Spec, b: Block) -> bool:
    return b.norm.kind == "layernorm"


def mha(s: Spec, b: Block) -> bool:
    return b.attention.kv_heads == b.attention.heads


def bfloat16(x: float) -> float:
    bits = np.array([x], np.float32).view(np.uint32)
    return float(((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)[0])


def divisible(s: Spec, b: Block) -> bool:
    """transformers, which mlx-lm asks for the tokenizer, refuses a Llama of other sizes; mlx-lm runs Mistral's too."""
    return s.width % b.attention.heads == 0


def inverse_square(b: Block) -> int | None:
    """The whole number whose inverse square root is the attention scale (transformers takes no other)."""
    n = (b.attention.scale or 1.0) ** -2
    return round(n) if math.isclose(n, round(n), rel_tol=1e-12) else None


def moe(b: Block) -> MoE:
    """A layer's mixture, of which a row asks only where it has one."""
    assert isinstance(b.mlp, MoE)
    return b.mlp


def router(*, renormalise: bool | None = True, bias: bool = False) -> Check:
    """Softmax alone; `renormalise` none: either way."""

    def check(s: Spec, b: Block) -> bool:
        if not isinstance(b.mlp, MoE):
            return True
        r = b.mlp.router
        plain = r.score == "softmax" and r.scale == 1 and not r.correction and (bias or not r.bias)
        return plain and renormalise in (None, r.renormalise)

    return check


def mixture(renormalise: bool | None = True, *, bias: bool = False, shared: bool = False) -> dict[str, Check]:
    """What rows with experts ask; `shared`: of a shared expert with a gate, else none."""
    return {
        "block.mlp.kind": lambda s, b: isinstance(b.mlp, MoE),
        "block.mlp.router": router(renormalise=renormalise, bias=bias),
        "block.mlp.shared": lambda s, b: (
            not isinstance(b.mlp, MoE)
            or ((x := b.mlp.shared) is not None and x.gate if shared else b.mlp.shared is None)
        ),
    }


PLAIN: Mapping[str, Check] = {
    "block.norm.kind": lambda s, b: b.norm.kind == "rmsnorm",
    "block.norm.bias": lambda s, b: not b.norm.bias,
    "block.norm.offset": lambda s, b: not b.norm.offset,
    "block.placement": lambda s, b: b.placement == "pre",
    "block.parallel": lambda s, b: not b.parallel,
    "block.residual_scale": lambda s, b: b.residual_scale == 1,
    "block.attention.heads": ANY,
    "block.attention.head_dim": ANY,
    "block.attention.kv_heads": ANY,
    "block.attention.bias": ANY,
    "block.attention.position": uniform(_rotary),
    "block.attention.window": lambda s, b: set(windows(s)) == {None},
    "block.attention.scale": lambda s, b: math.isclose(b.attention.scale or 0, (b.attention.head_dim or 1) ** -0.5),
    "block.attention.softcap": lambda s, b: b.attention.softcap is None,
    "block.attention.clip": lambda s, b: b.attention.clip is None,
    "block.attention.sinks": lambda s, b: not b.attention.sinks,
    "block.attention.qk_norm": lambda s, b: b.attention.qk_norm is None,
    "block.mlp.kind": lambda s, b: not isinstance(b.mlp, MoE),
    "block.mlp.router": lambda s, b: not isinstance(b.mlp, MoE),
    "block.mlp.shared": ANY,
    "block.mlp.gated": lambda s, b: b.mlp.gated,
    "block.mlp.hidden": ANY,
    "block.mlp.activation": lambda s, b: b.mlp.activation == "silu",
    "block.mlp.bias": lambda s, b: not any(b.mlp.bias.model_dump().values()),
    "embedding.scale": lambda s, b: s.embedding.scale is None,
    "embedding.positions": lambda s, b: s.embedding.positions is None,
    "embedding.norm": lambda s, b: s.embedding.norm is None,
    "final_norm": lambda s, b: (n := s.final_norm) is not None and n.kind == b.norm.kind and same_eps(s, n)
    and not (n.bias and n.kind == "rmsnorm") and n.offset == b.norm.offset,
    "head.tied": ANY,
    "head.bias": lambda s, b: not s.head.bias,
    "head.scale": lambda s, b: s.head.scale is None,
    "head.softcap": lambda s, b: s.head.softcap is None,
}  # fmt: skip

LLAMA: Mapping[str, Check] = {"block.attention.window": one_window, "block.mlp.bias": ANY}
GEMMA: Mapping[str, Check] = {
    "block.norm.offset": lambda s, b: b.norm.offset == 1 and b.norm.weight,
    "block.placement": lambda s, b: b.placement == "sandwich",
    "block.attention.bias": no_bias, "block.attention.scale": lambda s, b: inverse_square(b) is not None,
    "block.mlp.activation": lambda s, b: b.mlp.activation == "gelu_tanh",
}  # fmt: skip
LAYERNORM: Mapping[str, Check] = {
    "block.norm.kind": layernorm, "block.norm.bias": ANY, "block.attention.head_dim": square,
}  # fmt: skip
