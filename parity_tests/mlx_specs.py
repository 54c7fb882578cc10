"""One small spec or more for every architecture of mlx-lm that a conversion may choose, features at their edges."""

from __future__ import annotations

from typing import Any

from parity_tests.cases import BASE, PATCHES
from spec import Spec, parse
from spec.config import merge

_LN: dict[str, Any] = {"kind": "layernorm"}
_LNB: dict[str, Any] = {"kind": "layernorm", "bias": True}
_ONE: dict[str, Any] = {"offset": 1.0, "eps": 1e-6}
_LOCAL: dict[str, Any] = {"attention": {"window": 6, "position": {"kind": "rope", "theta": 100.0}}}
_SCALED: dict[str, Any] = {"kind": "rope", "theta": 5000.0, "scaling": {"kind": "linear", "factor": 8.0}}
_GEMMA: dict[str, Any] = {
    "final_norm": _ONE,
    "block": {"norm": _ONE, "placement": "sandwich", "mlp": {"activation": "gelu_tanh"}},
}
_OLMO: dict[str, Any] = {"block": {"placement": "post", "attention": {"qk_norm": {"over": "width"}}}}
_HALF: dict[str, Any] = {"kind": "rope", "fraction": 0.5}
_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 4.0, 7.5]}


def _attn(**fields: Any) -> dict[str, Any]:
    return {"block": {"attention": fields}}


def _scaling(**fields: Any) -> dict[str, Any]:
    return _attn(position={"kind": "rope", "scaling": fields})


def _moe(experts: int, top_k: int, shared: dict[str, Any] | None = None, **router: Any) -> dict[str, Any]:
    mixture = {"kind": "moe", "experts": experts, "hidden": 32, "shared": shared, "router": {"top_k": top_k, **router}}
    return {"block": {"mlp": mixture}}


NATIVE: dict[str, list[tuple[dict[str, Any], ...]]] = {
    "llama": [
        (
            {"block": {"attention": {"bias": {"o": True}}, "mlp": {"bias": {"up": True}}}},
            _scaling(kind="linear", factor=3),
        ),
        (_attn(head_dim=12, position={**_HALF, "scaling": {"kind": "linear", "factor": 2.0}}),),
        ({"depth": 5, "pattern": [{"attention": {"window": 7}}, {"attention": {"window": 7}}, {}]},),
        (_attn(window=48), {"head": {"tied": True}}),
        (_scaling(kind="dynamic", factor=2.0, original_context=16),),
        (_scaling(kind="llama3", factor=8.0, original_context=32),),
        (_scaling(kind="yarn", factor=4.0, original_context=12, attention_factor=1.31),),
        (_scaling(kind="longrope", original_context=16, **_LONG),),
        (_scaling(kind="longrope", original_context=48, **_LONG),),
    ],
    "mistral": [(_attn(heads=3, kv_heads=1, head_dim=16), {"pattern": [{}, {"attention": {"window": 5}}]})],
    "qwen2": [(_attn(bias={"q": True, "v": True}, position={"kind": "rope", "fraction": 0.25}),)],
    "smollm3": [(
        {"depth": 4, "pattern": [{"attention": {"window": 9}}, {"attention": {"position": {"kind": "none"}}}]},
        _scaling(kind="llama3", factor=8.0, original_context=32),
    )],
    "qwen3": [
        (
            {"head": {"tied": True}, "final_norm": {"offset": 1.0}, "block": {"norm": {"offset": 1.0}}},
            _attn(heads=3, kv_heads=1, head_dim=12, qk_norm={"offset": 1.0}, position=_HALF),
        ),
        (_attn(qk_norm={"weight": False}),),
    ],
    "granite": [(
        {"embedding": {"scale": 3.3}, "head": {"scale": 0.21, "tied": True}, "block": {"residual_scale": 0.22}},
        _attn(scale=0.11, bias=True),
    )],
    "olmo2": [(_OLMO, _attn(heads=6, kv_heads=3, head_dim=12, position=_HALF), {"block": {"mlp": {"bias": True}}})],
    "olmo3": [(_OLMO, {"depth": 4, "pattern": [*[{"attention": {"window": 6}}] * 3, {}]})],
    "gemma2": [(
        _GEMMA, {"embedding": {"scale": 32**0.5}, "head": {"tied": True, "softcap": 30.0}},
        _attn(softcap=5.0, scale=0.25),
    )],
    "gemma3_text": [
        (
            _GEMMA, {"depth": 5, "width": 64, "embedding": {"scale": 8.0}},
            {"pattern": [_LOCAL, _LOCAL, {"attention": {"position": _SCALED}}]},
            _attn(scale=0.25, head_dim=12, qk_norm=_ONE),
        ),
        (_GEMMA, {"width": 64, "embedding": {"scale": 8.0}, "head": {"tied": True}}, _attn(qk_norm=_ONE)),
    ],
    "cohere": [
        (
            {"final_norm": _LN, "head": {"tied": True, "scale": 0.25}},
            {"block": {"norm": _LN, "parallel": True, "shared_norm": True, "attention": {"bias": True}}},
        ),
        ({"final_norm": _LNB, "head": {"tied": True}}, {"block": {"norm": _LN, "parallel": True, "shared_norm": True}}),
    ],
    "stablelm": [
        ({"final_norm": _LNB}, {"block": {"norm": _LNB, "attention": {"bias": {"q": True}, "position": _HALF}}}),
        ({"final_norm": {**_LN, "weight": False}}, {"block": {"norm": _LNB, "parallel": True, "shared_norm": True}}),
    ],
    "starcoder2": [(
        {"final_norm": _LNB, "head": {"tied": True}},
        {"block": {"norm": _LNB, "mlp": {"gated": False, "activation": "gelu", "bias": True}}},
    )],
    "nemotron": [(
        {"final_norm": {**_LNB, "offset": 1.0}},
        {"block": {"norm": {**_LN, "offset": 1.0}, "mlp": {"gated": False, "activation": "relu2"}}},
        _attn(head_dim=12, position=_HALF),
    )],
    "gpt2": [(PATCHES["gpt2"], {"block": {"mlp": {"hidden": 128}}})],
    "mixtral": [
        (_moe(8, 2), {"head": {"tied": True}, "block": {"norm": {"offset": 1.0}}, "final_norm": {"offset": 1.0}}),
        (_moe(3, 1), _attn(position={"kind": "rope", "theta": 500.0})),
    ],
    "qwen3_moe": [
        (_moe(6, 3), _attn(heads=3, kv_heads=1, head_dim=12, qk_norm={"eps": 1e-5})),
        (_moe(5, 2, renormalise=False), _attn(qk_norm={}), {"head": {"tied": True}}),
    ],
    "qwen2_moe": [(_moe(5, 2, {"hidden": 64, "gate": True}, renormalise=False), _attn(bias={"q": True}))],
    "olmoe": [
        (
            _moe(6, 2, renormalise=False), _attn(head_dim=12, qk_norm={"over": "width"}, bias=True),
            {"block": {"mlp": {"bias": {"down": True}}}},
        ),
        (_moe(4, 4), _attn(qk_norm={"over": "width"}), _scaling(kind="llama3", factor=8.0, original_context=32)),
    ],
    "granitemoe": [(
        _moe(7, 2), {"embedding": {"scale": 3.3}, "head": {"scale": 0.21, "tied": True}},
        {"block": {"residual_scale": 0.22}}, _attn(scale=0.11),
    )],
    "gpt_oss": [
        (
            _moe(5, 2, bias=True), {"pattern": [{"attention": {"window": 6}}, {}]},
            {"block": {"mlp": {"activation": "clamped_swiglu", "bias": True}}}, _attn(sinks=True, bias=True),
            _scaling(kind="yarn", factor=4.0, original_context=12),
        ),
        (
            _moe(4, 3), {"depth": 3, "pattern": [{}, {"attention": {"window": 9}}]}, _attn(sinks=True, head_dim=12),
            {"block": {"mlp": {"activation": "clamped_swiglu"}}},
        ),
    ],
}  # fmt: skip
"""Patches to the small Llama of `cases`, by the architecture that carries them."""


def _spec(patches: tuple[dict[str, Any], ...]) -> Spec:
    data = BASE
    for p in patches:
        data = merge(data, p)
    return parse(data)


CASES: dict[str, tuple[str, Spec]] = {
    f"{arch}-{n}": (arch, _spec(patches)) for arch, found in NATIVE.items() for n, patches in enumerate(found)
}
"""A name to the architecture and the spec."""
