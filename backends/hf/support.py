"""What transformers carries: pure data, answered without torch or transformers."""

from __future__ import annotations

from backends.base import Option, Support
from backends.carriers import explained
from backends.hf import rotary
from backends.hf.carriers import BY_ARCH, CARRIERS
from backends.hf.fit import Fit, choose, examine
from spec.config import Spec
from spec.errors import nearest
from spec.levels import CODES, GROUPS, LEVELS, fits
from spec.params import params

OPTIONS = (Option("architecture", tuple(BY_ARCH), "", "transformers' class of models; by default the simplest"),)


def levels() -> tuple[str, ...]:
    """The portable precision levels."""
    return tuple(LEVELS)


def bits(level: str) -> float:
    """Bits that a weight takes at a level, scales counted."""
    return LEVELS[level].stored


def support(spec: Spec, level: str, architecture: str = "") -> Support:
    """Whether and how transformers carries `spec` at `level`. architecture: the only one that will do."""
    if level not in LEVELS:
        return Support("hf", refusals=(f"level: {level} is none of Hugging Face's ({nearest(level, LEVELS)})",))
    if architecture and architecture not in BY_ARCH:
        return Support("hf", refusals=(f"--architecture {architecture}: is none ({nearest(architecture, BY_ARCH)})",))
    fit = choose(spec, architecture)
    refusals = explained(fit, [examine(spec, c) for c in CARRIERS], "transformers")
    if fit.carrier.wide_scores and level in ("f16", "bf16"):
        refusals.append(
            f"level: {level}, at which transformers' {fit.carrier.arch} rounds ALiBi biases (try f32 or q8)"
        )
    if refusals:
        return Support("hf", fit.carrier.arch, refusals=tuple(refusals))
    return Support("hf", fit.carrier.arch, tuple(f.text for f in fit.folds), (), tuple(_notes(fit, level)))


def _notes(fit: Fit, level: str) -> list[str]:
    spec, out = fit.source, []
    if fit.session is not None:
        out.append(f"rotary tables are those of a session of {fit.session} tokens, at every length")
    boundary = rotary.chosen_by_length(spec) if fit.carrier.rope != "none" else None
    if boundary is not None:
        out.append(f"transformers takes LongRoPE's long factors for sequences of more than {boundary} tokens and the "
                   "short ones up to there: a text that grows beyond it in the cache mixes both")  # fmt: skip
    if level not in GROUPS:
        return out
    narrow = sorted({p.shape[-1] for p in params(spec) if p.matrix and not fits(level, p.shape[-1])})
    if narrow:
        out.append(f"matrices of width {', '.join(map(str, narrow))} stay f16: no multiples of {GROUPS[level]}")
    out.append("transformers unpacks no embeddings: code * scale is stored, as float16 (4 bits) or float32 (q8)")
    if fit.carrier.mixture is not None:
        out.append(_experts(fit, level))
    if not fit.carrier.packs:
        out.append(f"nor products of {fit.carrier.arch}, which are stored in the same way: nothing is saved over f16")
    elif CODES[level] == 4:
        out.append("q, k and v (gate and up) have 8 bits where one of them is int8, as vLLM computes them together")
    return out


def _experts(fit: Fit, level: str) -> str:
    if not fit.carrier.apart:
        return f"nor experts of {fit.carrier.arch}, which lie in one tensor: they are stored like embeddings"
    if any(not fits(level, p.shape[-1]) for p in params(fit.source) if p.role == "experts"):
        return "nor experts where some stay f16: all are stored stacked, like embeddings"
    return "packed experts have float32 scales (half a bit a weight more): transformers computes them in float32 alone"
