"""Which attention kernel runs, why, and the kernels.

The choice is made once a forward pass for each distinct attention setting, outside the blocks, so that compiled blocks
see only its outcome (`Plan`) and masks are built once and not once a layer.

Shapes: B batch, T query, S key, H q-heads, G kv-heads, K head dim.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends.torch.cache import visible
from spec.config import Alibi, Attention
from spec.errors import UserError, nearest
from spec.ops import Step

log = logging.getLogger(__name__)

Kernel = Literal["sdpa", "flash", "efficient", "cudnn", "flex", "varlen", "math"]
"""`sdpa` lets torch's scaled_dot_product_attention choose; `flash`, `efficient` and `cudnn` are its kernels by name."""
Setting = Literal["auto", "sdpa", "flash", "efficient", "cudnn", "flex", "varlen", "math"]


@dataclass(frozen=True)
class Keys:
    """The keys of a cache whose rows are padded, S of them."""

    slots: Tensor
    """[B, S] int."""
    segments: Tensor
    """[B, S] int."""


@dataclass(frozen=True)
class Request:
    """What the choice depends on, besides the attention setting itself."""

    step: Step[Tensor]
    start: int
    """Tokens already in the cache."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    training: bool
    """Whether dropout is active."""
    grad: bool
    """Whether a backward pass may follow."""
    keys: Keys | None = None
    """Where a cache's keys are not simply slots 0 and on, the same in every row."""
    strict: bool = False
    """Whether falling back to the reference mathematics on a GPU is an error."""

    @property
    def tokens(self) -> int:
        """T, the queries of this step."""
        return self.step.slots.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.step.slots.device

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of a CUDA device; (0, 0) elsewhere."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class Plan:
    """The outcome: a kernel and what it needs."""

    kernel: Kernel
    causal: bool = False
    """Slots are 0..T-1 on both sides and nothing but causality masks."""
    mask: Tensor | None = None
    """[B or 1, 1, T, S] bool, true where visible; none where `causal`, or where everything is visible."""
    distance: Tensor | None = None
    """[B or 1, 1, T, S] int: query slot - key slot, for ALiBi."""
    block_mask: Any = None
    """FlexAttention's block mask, with the slots in `query_slots` and `key_slots` ([B or 1, T], [B or 1, S])."""
    query_slots: Tensor | None = None
    key_slots: Tensor | None = None
    cumulative: Tensor | None = None
    """[documents + 1] int32: starts of the documents in the flattened batch, for varlen."""
    longest: int = 0
    """Tokens of the longest document."""
    dropout: float = 0.0


def features(a: Attention, r: Request) -> tuple[str, ...]:
    """What the kernel must do beyond plain causal attention in this step."""
    present = {
        "cache": r.step.layout == "cached",
        "documents": r.step.segments is not None,
        "window": a.window is not None and a.window < r.start + r.tokens,
        "softcap": a.softcap is not None,
        "sinks": a.sinks,
        "alibi": isinstance(a.position, Alibi),
        "dropout": r.training and a.dropout > 0,
    }
    return tuple(name for name, here in present.items() if here)


MASKED = ("documents", "window", "alibi")
"""Features that become a mask or a bias."""

UNSERVED: dict[Kernel, tuple[str, ...]] = {
    "sdpa": ("softcap", "sinks"),
    "flash": (*MASKED, "softcap", "sinks"),
    "efficient": ("softcap", "sinks"),
    "cudnn": (*MASKED, "softcap", "sinks"),  # with a mask its gradients can be NaN (pytorch#196678)
    "flex": ("dropout",),
    "varlen": ("cache", "softcap", "sinks", "alibi", "dropout"),
    "math": (),
}
"""Features that a kernel has no exact way to serve."""

FUSED: dict[Kernel, tuple[tuple[int, int], int]] = {
    "flash": ((8, 0), 256),
    "varlen": ((8, 0), 256),
    "cudnn": ((8, 0), 128),
}
"""Kernels of 16-bit floats alone: the least compute capability, and the largest head_dim."""


def obstacle(kernel: Kernel, a: Attention, r: Request) -> str | None:
    """Why a kernel cannot run this, or none."""
    return lacking(kernel, features(a, r), r.device.type, r.dtype, r.capability, a.head_dim or 0, r.grad)


def lacking(
    kernel: Kernel,
    present: tuple[str, ...],
    kind: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    head_dim: int,
    grad: bool,
) -> str | None:
    """Why a kernel cannot serve these features on a device of this type and capability, or none."""
    for feature in present:
        if feature in UNSERVED[kernel]:
            return f"it has no {feature}"
    half = dtype in (torch.float16, torch.bfloat16)
    if kernel in FUSED:
        least, widest = FUSED[kernel]
        if not (kind == "cuda" and half):
            return f"it needs 16-bit floats on a CUDA device, not {_name(dtype)} on {kind}"
        if capability < least:
            return f"it needs compute capability {least[0]}.{least[1]}, not {capability[0]}.{capability[1]}"
        if head_dim % 8 or head_dim > widest:
            return f"it needs a head_dim that is a multiple of 8 up to {widest}, not {head_dim}"
    if kernel == "efficient" and kind != "cuda":
        return f"it needs a CUDA device, not {kind}"
    if kernel == "flex" and kind != "cuda" and grad:
        return f"torch has no backward pass for it on {kind}"
    if kernel in ("flex", "efficient") and kind == "cuda" and dtype == torch.float64:
        return "it has no float64 on CUDA"
    return None


def preference(present: tuple[str, ...], kind: str) -> tuple[Kernel, ...]:
    """Kernels from the fastest down for these features on a device of this type."""
    if kind != "cuda" or "cache" in present:  # decoding: a flex kernel would recompile as the cache grows
        return "sdpa", "math"
    if "documents" in present or "window" in present:  # the first two skip whole blocks; a mask does not
        return "varlen", "flex", "efficient", "math"
    return "flash", "efficient", "flex", "math"


def choose(a: Attention, setting: str, r: Request) -> tuple[Kernel, str]:
    """The kernel for one attention setting in one step, and the reason.

    Raises `UserError` where `setting` names a kernel that cannot serve it.
    """
    if setting not in get_args(Setting):
        raise UserError(f"attention={setting!r}: no such kernel ({nearest(setting, get_args(Setting))})")
    present = features(a, r)
    wanted = " with " + ", ".join(present) if present else ""
    if setting in ("flash", "efficient", "cudnn") and "cache" in present:
        setting = "auto"  # decoding needs masks; torch takes these kernels where it can
    if setting != "auto":
        why = obstacle(setting, a, r)  # type: ignore[arg-type]
        if why:
            raise UserError(f"the kernel {setting!r} cannot run causal attention{wanted}: {why} (use 'auto' or 'math')")
        return setting, f"causal attention{wanted}: asked for"  # type: ignore[return-value]
    passed: list[str] = []
    for kernel in preference(present, r.device.type):
        why = obstacle(kernel, a, r)
        if why is None and kernel == "math" and r.strict and r.device.type == "cuda" and "cache" not in present:
            raise UserError(
                f"attention: no fast kernel serves causal attention{wanted} in {_name(r.dtype)} ({'; '.join(passed)}); "
                "--attention.kernel math takes the reference, --attention.allow-fallback wherever nothing else serves"
            )
        if why is None:
            rest = f" ({'; '.join(passed)})" if passed else ""
            return kernel, f"causal attention{wanted} in {_name(r.dtype)} on {r.device.type}{rest}"
        passed.append(f"not {kernel}: {why}")
    raise AssertionError("math serves everything")


def chosen(
    kinds: Iterable[Attention],
    setting: str,
    tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool = False,
    training: bool = True,
    strict: bool = False,
) -> dict[str, str]:
    """Which kernel a training step over `tokens` tokens will use and why, for each attention setting. Raises
    `UserError` where there is none."""
    slots = torch.arange(tokens, device=device)[None]
    step = Step("packed" if packed else "causal", slots, slots, slots * 0 if packed else None)
    request = Request(step, 0, dtype, training, True, strict=strict)
    return {reason: kernel for kernel, reason in (choose(a, setting, request) for a in kinds)}


def plan(a: Attention, setting: str, r: Request) -> Plan:
    """Choose a kernel, say so once, and build what it needs."""
    kernel, reason = choose(a, setting, r)
    slow = kernel == "math" and r.device.type == "cuda" and setting == "auto" and r.step.layout != "cached"
    _say(logging.WARNING if slow else logging.INFO, kernel, reason)
    dropout = a.dropout if r.training else 0.0
    present = features(a, r)
    alibi = "alibi" in present
    if kernel == "varlen":
        cumulative, longest = rounded(*documents(r.step))
        return Plan(kernel, cumulative=cumulative, longest=longest)
    keys, key_segments = _keys(a, r)
    if kernel == "flex":
        return Plan(kernel, block_mask=_block_mask(a, r, keys, key_segments), query_slots=r.step.slots, key_slots=keys)
    whole = r.step.layout == "causal" or (r.step.layout == "cached" and r.start == 0 and r.keys is None)
    if whole and kernel in PINNED and not alibi and "window" not in present:
        return Plan(kernel, causal=True, dropout=dropout)
    if r.step.layout == "cached" and r.tokens == 1 and not alibi and r.keys is None:
        return Plan(kernel, dropout=dropout)  # the cache hands out exactly what one token sees
    slots, segments = r.step.slots, r.step.segments
    if segments is None:
        slots = slots[:1]  # equal in every row
        keys = keys[:1]
    distance = slots[:, None, :, None] - keys[:, None, None, :]
    mask = distance >= 0
    if a.window is not None:
        mask = mask & (distance < a.window)
    if segments is not None and key_segments is not None:
        mask = mask & (segments[:, None, :, None] == key_segments[:, None, None, :])
    return Plan(kernel, mask=mask, distance=distance if alibi else None, dropout=dropout)


@cache
def _say(level: int, kernel: str, reason: str) -> None:
    log.log(level, "attention kernel %s: %s", kernel, reason)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keys(a: Attention, r: Request) -> tuple[Tensor, Tensor | None]:
    """Slots [B or 1, S] of the keys, and their segments [B, S]."""
    if r.keys is not None:
        return r.keys.slots, r.keys.segments
    if r.step.layout != "cached":
        return r.step.slots, r.step.segments
    seen = visible(r.start, r.tokens, a.window)
    return torch.arange(seen.start, seen.stop, device=r.device)[None], None


def documents(step: Step[Tensor]) -> tuple[Tensor, int]:
    """Starts of the documents in the flattened batch (and its end), int32, and the longest one's tokens.

    A document is a run of equal segments; without segments each row is one.
    """
    batch, tokens = step.slots.shape
    first = torch.ones(batch, tokens, dtype=torch.bool, device=step.slots.device)
    first[:, 1:] = False if step.segments is None else step.segments[:, 1:] != step.segments[:, :-1]
    end = torch.tensor([batch * tokens], device=first.device)
    starts = torch.cat([first.flatten().nonzero().flatten(), end])
    return starts.to(torch.int32), int(starts.diff().max())


def rounded(cumulative: Tensor, longest: int) -> tuple[Tensor, int]:
    """With empty documents up to a power of two, and the longest one's bound a power of two: compiled layers are made
    for a few sizes, not for each number of documents."""
    count = 1 << (len(cumulative) - 2).bit_length()
    padding = cumulative[-1:].expand(count + 1 - len(cumulative))
    return torch.cat([cumulative, padding]), 1 << (longest - 1).bit_length()


# The kernels: (q [B, H, T, K], k and v [B, G, S, K], plan, setting, weights) -> [B, H, T, K]


def math_attention(q: Tensor, k: Tensor, v: Tensor, p: Plan, a: Attention, w: Any) -> Tensor:
    """The reference: every feature, softmax in at least float32, scores in memory."""
    assert a.scale is not None, "a resolved layer"
    k, v = _repeat(k, q), _repeat(v, q)
    scores = (q @ k.transpose(-2, -1)).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    scores = scores * a.scale
    if a.softcap is not None:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    if p.distance is not None:
        scores = scores - w.slopes[:, None, None].to(scores.dtype) * p.distance
    if p.mask is not None:
        scores = scores.masked_fill(~p.mask, -torch.inf)
    if w.sinks is None:
        probs = scores.softmax(-1)
    else:
        sinks = w.sinks[None, :, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    if p.dropout:
        probs = F.dropout(probs, p.dropout)
    return probs.to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, p: Plan, a: Attention, w: Any) -> Tensor:
    """torch's fused kernels: the plan's own, or torch's choice. One that cannot run raises, rather than another one
    running in its place."""
    mask = p.mask
    if p.distance is not None:
        assert mask is not None
        bias = -w.slopes[:, None, None].to(q.dtype) * p.distance.to(q.dtype)
        mask = bias.masked_fill(~mask, -torch.inf)
    if mask is not None or not p.causal or p.kernel == "efficient":  # not every kernel groups heads by itself
        k, v = _repeat(k, q), _repeat(v, q)
    with _pinned(p.kernel):
        return F.scaled_dot_product_attention(
            q, k, v, mask, p.dropout, is_causal=p.causal, scale=a.scale, enable_gqa=k.shape[1] != q.shape[1]
        )


PINNED: dict[Kernel, SDPBackend | None] = {
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _pinned(kernel: Kernel) -> Any:
    backend = PINNED[kernel]
    return nullcontext() if backend is None else sdpa_kernel(backend)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, p: Plan, a: Attention, w: Any) -> Tensor:
    """Flash attention over documents laid end to end; windows skip whole blocks."""
    from torch.nn.attention.varlen import varlen_attn

    assert p.cumulative is not None
    flat_q, flat_k, flat_v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    y = varlen_attn(
        flat_q,
        flat_k,
        flat_v,
        p.cumulative,
        p.cumulative,
        p.longest,
        p.longest,
        scale=a.scale,
        window_size=(-1 if a.window is None else a.window - 1, 0),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    assert isinstance(y, Tensor)
    return y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, p: Plan, a: Attention, w: Any) -> Tensor:
    """FlexAttention: compiled on a GPU, torch's own reference elsewhere."""
    from torch.nn.attention.flex_attention import AuxRequest

    slopes, query_slots, key_slots = w.slopes, p.query_slots, p.key_slots
    assert query_slots is not None and key_slots is not None
    rows = query_slots.shape[0] > 1
    key_rows = key_slots.shape[0] > 1

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if a.softcap is not None:
            s = a.softcap * torch.tanh(s / a.softcap)
        if slopes is not None:
            s = s - slopes[h] * (query_slots[b if rows else 0, i] - key_slots[b if key_rows else 0, j])
        return s

    plain = a.softcap is None and slopes is None
    y, aux = _flex(q.device.type)(
        q,
        k,
        v,
        score_mod=None if plain else score,
        block_mask=p.block_mask,
        scale=a.scale,
        enable_gqa=k.shape[1] != q.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if w.sinks is not None:  # the sink joins the denominator: exp(lse) / (exp(lse) + exp(sink))
        y = y * torch.sigmoid(aux.lse - w.sinks[None, :, None].to(aux.lse.dtype))[..., None].to(y.dtype)
    return y


KERNELS: dict[Kernel, Callable[[Tensor, Tensor, Tensor, Plan, Attention, Any], Tensor]] = {
    "math": math_attention,
    "sdpa": sdpa_attention,
    "flash": sdpa_attention,
    "efficient": sdpa_attention,
    "cudnn": sdpa_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
}


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, S, K] -> [B, H, S, K]: each kv-head for its group of query heads."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


@cache
def _flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    def reference(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():  # it warns that it materialises the scores; that was the choice
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex(*args, **options)

    return torch.compile(flex) if device == "cuda" else reference


def _block_mask(a: Attention, r: Request, keys: Tensor, key_segments: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    slots, segments, window = r.step.slots, r.step.segments, a.window
    key_rows = keys.shape[0] > 1

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = slots[b, i] - keys[b if key_rows else 0, j]
        ok = distance >= 0
        if window is not None:
            ok = ok & (distance < window)
        return ok if segments is None or key_segments is None else ok & (segments[b, i] == key_segments[b, j])

    make = torch.compile(create_block_mask) if r.device.type == "cuda" else create_block_mask
    return make(seen, slots.shape[0], None, r.tokens, keys.shape[1], device=r.device)
