"""Backends whose runtimes have no way to run a token's own experts alone: every expert runs, up to a bound."""

from __future__ import annotations

from spec.config import MoE, Spec

MOST = 8
"""How many times the arithmetic of the chosen experts that of all of them may be.

Measured on a CPU (ONNX Runtime, 32 experts of 1024 x 512, 4 chosen): a prompt of 128 tokens takes 5 to 7 times as long
with all experts as with each token's own, and a single token, bound by memory, 16 times. Mixtral (8 / 2), OLMoE
(64 / 8) and GPT-OSS 20B (32 / 4) stay within it.
"""


def too_many(spec: Spec, backend: str) -> list[str]:
    """Refusals of the layers that go beyond `MOST`, one for each kind of layer."""
    return [
        f"layers[{i}].mlp.experts: {m.experts} with router.top_k={m.router.top_k}: {backend} would run all of them for "
        f"every token, {m.experts / m.router.top_k:.3g} times the arithmetic (at most {MOST} times; gguf, mlx and onnx "
        "run the chosen alone)"
        for m, i in _mixtures(spec).items()
        if m.experts > MOST * m.router.top_k
    ]


def notes(spec: Spec, backend: str, tokens: str = "every token") -> list[str]:
    """What a user should know of the others. tokens: those for which all experts run."""
    found = {m: i for m, i in _mixtures(spec).items() if m.experts > m.router.top_k}
    if not found:
        return []
    most = max(m.experts / m.router.top_k for m in found)
    return [f"{backend} runs every expert for {tokens}: {most:.3g} times the experts' arithmetic"]


def _mixtures(spec: Spec) -> dict[MoE, int]:
    """Every kind of mixture and the first layer that has it."""
    out: dict[MoE, int] = {}
    for i, b in enumerate(spec.layers):
        if isinstance(b.mlp, MoE):
            out.setdefault(b.mlp, i)
    return out
