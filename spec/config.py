"""The spec: everything that defines a decoder transformer, as frozen data.

A YAML file is validated into `Spec`. `Spec.layers` holds one fully resolved `Block` per layer: the repeated
`pattern` and the `overrides` are merged in, and every default that depends on another field (head_dim, kv_heads,
scale) is filled in, so no reader of a resolved layer ever computes a default.

Nothing here depends on a model's name. Everything that changes the mathematics is a field.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from spec.errors import Problem, SpecError, problems_from

VERSION = 1

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Model(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, strict=False, validate_default=True
    )


class Norm(Model):
    """A normalisation layer: `y = (x - mean) / sqrt(var + eps) * (offset + weight) + bias`; RMSNorm takes no mean."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """`rmsnorm` (Zhang & Sennrich 2019) or `layernorm` (Ba et al. 2016)."""
    eps: Positive = 1e-5
    """Added to the mean square (or variance) before the square root."""
    weight: bool = True
    """Whether the norm has a learned gain."""
    bias: bool = False
    """Whether the norm has a learned bias."""
    offset: Finite = 0.0
    """Added to the stored gain: 1.0 for `(1 + w)` norms as in Gemma. Stored weights stay raw."""

    @model_validator(mode="after")
    def _offset_needs_weight(self) -> Self:
        if self.offset and not self.weight:
            raise ValueError("offset needs a learned gain (set weight: true, or offset: 0)")
        return self


class QKNorm(Norm):
    """Normalisation of queries and keys before the rotation."""

    over: Literal["head", "width"] = "head"
    """`head`: each head vector by itself, one gain of head_dim (Qwen 3, Gemma 3); `width`: the whole projection,
    one gain of heads * head_dim (OLMo 2)."""


Stretch = Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)]
"""How many times longer a context is: a thousand times what any model has, and far from where float32 ends."""


class LinearScaling(Model):
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    kind: Literal["linear"]
    factor: Stretch
    """How many times longer than the original context."""


class DynamicScaling(Model):
    """NTK-aware scaling whose base grows with the session's declared length (chosen once per session)."""

    kind: Literal["dynamic"]
    factor: Stretch
    """Scaling factor alpha of the NTK formula."""
    original_context: Size | None = None
    """Context length of pre-training; none means the spec's `context`."""


class Llama3Scaling(Model):
    """The frequency-banded scaling of Llama 3.1."""

    kind: Literal["llama3"]
    factor: Stretch
    """How much the low frequencies are divided by."""
    low_freq_factor: Positive = 1.0
    """Wavelengths above original_context / low_freq_factor are scaled fully."""
    high_freq_factor: Positive = 4.0
    """Wavelengths below original_context / high_freq_factor are left alone."""
    original_context: Size = 8192
    """Context length of pre-training."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must exceed low_freq_factor")
        return self


class YarnScaling(Model):
    """YaRN (Peng et al. 2023): interpolation by parts, with an attention temperature."""

    kind: Literal["yarn"]
    factor: Stretch
    """How many times longer than the original context."""
    original_context: Size | None = None
    """Context length of pre-training; none means the spec's `context`."""
    beta_fast: Positive = 32.0
    """Rotations over the original context above which a dimension is left alone."""
    beta_slow: Positive = 1.0
    """Rotations over the original context below which a dimension is fully interpolated."""
    attention_factor: Positive | None = None
    """Multiplies cos and sin; none means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether the correction range is rounded to whole dimensions."""


class LongRopeScaling(Model):
    """LongRoPE (Ding et al. 2024): one divisor per frequency, short or long by the session's declared length."""

    kind: Literal["longrope"]
    short_factor: tuple[Positive, ...]
    """Divisors while the declared length is at most original_context; rotary_dim / 2 of them."""
    long_factor: tuple[Positive, ...]
    """Divisors beyond it; rotary_dim / 2 of them."""
    original_context: Size
    """Context length of pre-training."""
    attention_factor: Positive | None = None
    """Multiplies cos and sin; none means sqrt(1 + ln(context / original_context) / ln(original_context))."""


RopeScaling = Annotated[
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling, Field(discriminator="kind")
]


class Rope(Model):
    """Rotary positions (Su et al. 2021), half-split layout: pair i is (x[i], x[i + rotary_dim / 2])."""

    kind: Literal["rope"] = "rope"
    theta: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10000.0
    """Base of the frequencies theta^(-2i / rotary_dim)."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of head_dim that is rotated (the first dimensions); the rest passes through."""
    scaling: RopeScaling | None = None
    """Context extension."""

    @model_validator(mode="after")
    def _yarn_needs_a_base(self) -> Self:
        if self.theta == 1 and isinstance(self.scaling, YarnScaling):
            raise ValueError("theta must exceed 1 with yarn scaling")
        return self

    def rotary_dim(self, head_dim: int) -> int:
        """Number of rotated dimensions of a head of `head_dim`."""
        return int(head_dim * self.fraction)


class Alibi(Model):
    """Attention with linear biases (Press et al. 2021): score -= slope * distance."""

    kind: Literal["alibi"]
    max_bias: Positive = 8.0
    """Slopes are 2^(-max_bias * i / heads) for i = 1..heads (heads a power of two; else interleaved as there)."""


class NoPosition(Model):
    """No positions inside attention (NoPE, or learned positions added to the embedding)."""

    kind: Literal["none"]


Position = Annotated[Rope | Alibi | NoPosition, Field(discriminator="kind")]


def _spread(names: tuple[str, ...]) -> BeforeValidator:
    """`true` or `false` where a mapping of biases is expected stands for all of them."""
    return BeforeValidator(lambda v: dict.fromkeys(names, v) if isinstance(v, bool) else v)


class AttentionBias(Model):
    """Which attention projections have a bias."""

    q: bool = False
    k: bool = False
    v: bool = False
    o: bool = False


class MLPBias(Model):
    """Which MLP projections have a bias (`gate` only where the MLP is gated)."""

    gate: bool = False
    up: bool = False
    down: bool = False


class Attention(Model):
    """Causal self-attention; order inside: scale, softcap, mask, softmax in float32, values."""

    heads: Size
    """Query heads."""
    kv_heads: Size | None = None
    """Key/value heads: none = heads (MHA), fewer = GQA, 1 = MQA."""
    head_dim: Size | None = None
    """Width of a head; none = width / heads."""
    bias: Annotated[AttentionBias, _spread(("q", "k", "v", "o"))] = AttentionBias()
    """Biases of q, k, v, o; `true` stands for all four."""
    position: Position = Rope()
    """Positions inside attention: `rope`, `alibi` or `none`."""
    window: Size | None = None
    """Sliding window: a query sees itself and the window - 1 keys before it; none = everything before it."""
    scale: Positive | None = None
    """Factor on q.k; none = head_dim^-0.5."""
    softcap: Positive | None = None
    """c * tanh(score / c) on the scaled scores (Gemma 2)."""
    clip: Positive | None = None
    """Clamp the outputs of the q, k and v projections to [-clip, clip] (OLMo, MPT)."""
    sinks: bool = False
    """One learned logit per head joins the softmax's denominator and carries no value (GPT-OSS)."""
    qk_norm: QKNorm | None = None
    """Normalisation of q and k before the rotation."""
    dropout: Probability = 0.0
    """Dropout on attention probabilities, in training only."""


Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "clamped_swiglu"]


class FeedForward(Model):
    """`down(act(up(x)))`, or gated: `down(act(gate(x)) * up(x))`."""

    hidden: Size
    """Inner width; of one expert, where there are several."""
    gated: bool = True
    """Whether a gate projection multiplies the up projection (GLU)."""
    activation: Activation = "silu"
    """`silu`, `gelu` (erf), `gelu_tanh`, `quick_gelu` (x sigmoid(1.702 x)), `relu`, `relu2` (relu squared), or
    `clamped_swiglu` (GPT-OSS: (min(up, limit) + 1) * g sigmoid(alpha g), g = min(gate, limit); gated only)."""
    alpha: Positive = 1.702
    """Slope of `clamped_swiglu`'s sigmoid."""
    limit: Positive = 7.0
    """Clamp of `clamped_swiglu`."""
    bias: Annotated[MLPBias, _spread(("gate", "up", "down"))] = MLPBias()
    """Biases of gate, up, down; `true` stands for all of them."""
    dropout: Probability = 0.0
    """Dropout on the inner activations, in training only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ValueError("activation clamped_swiglu needs gated: true")
        return self


class MLP(FeedForward):
    """One feed-forward network that every token passes."""

    kind: Literal["dense"] = "dense"


class Router(Model):
    """Which experts a token goes to, and how much each counts (Shazeer et al. 2017; in float32 or wider).

    scores = softmax or sigmoid of the logits; chosen = the top_k of scores + correction, the lower number first among
    equals; weights = the chosen scores, divided by their sum with `renormalise`, times `scale`.
    """

    top_k: Size
    """Experts that a token passes."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of logits: `softmax` over all experts (Mixtral), or `sigmoid` of each (DeepSeek-V3)."""
    renormalise: bool = True
    """Whether the chosen scores are divided by their sum. With softmax that is the softmax over the chosen logits."""
    scale: Positive = 1.0
    """Factor on the weights (DeepSeek-V3's routed scaling factor)."""
    bias: bool = False
    """Whether the logits have a learned bias (GPT-OSS)."""
    correction: bool = False
    """Whether a learned number of each expert is added to its score for the choice alone (DeepSeek-V3)."""


class SharedExpert(Model):
    """A network of the experts' kind that every token passes, added to what the chosen experts give."""

    hidden: Size
    """Its inner width."""
    gate: bool = False
    """Whether it is multiplied by the sigmoid of a learned product with the input (Qwen2-MoE)."""


class MoE(FeedForward):
    """Mixture of experts: each token passes the few that its router chooses. `hidden`, `gated`, `activation` and `bias`
    are those of one expert."""

    kind: Literal["moe"]
    experts: Size
    """How many there are."""
    router: Router
    """How they are chosen."""
    shared: SharedExpert | None = None
    """A network beside them for every token."""

    @property
    def shared_mlp(self) -> MLP:
        """The shared expert as a feed-forward network."""
        assert self.shared is not None, "a mixture with a shared expert"
        fields = {name: getattr(self, name) for name in FeedForward.model_fields}
        return MLP(**{**fields, "hidden": self.shared.hidden})

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.router.top_k > self.experts:
            raise ValueError(f"router.top_k={self.router.top_k} exceeds experts={self.experts}")
        return self


def _mlp_kind(value: Any) -> str:
    kind = value.get("kind", "dense") if isinstance(value, Mapping) else getattr(value, "kind", "dense")
    return kind if isinstance(kind, str) else str(kind)


AnyMLP = Annotated[Annotated[MLP, Tag("dense")] | Annotated[MoE, Tag("moe")], Discriminator(_mlp_kind)]


class Block(Model):
    """One decoder layer."""

    attention: Attention
    mlp: AnyMLP
    """The feed-forward part: `dense` (the default kind) or `moe`."""
    norm: Norm = Norm()
    """The layer's norms; which there are is `placement`."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    """`pre`: x + f(norm(x)); `post`: x + norm(f(x)) (OLMo 2); `sandwich`: x + norm(f(norm(x))) (Gemma 2)."""
    parallel: bool = False
    """Attention and MLP both read the layer's input and are added together (GPT-NeoX, Phi-2)."""
    shared_norm: bool = False
    """With `parallel`: one norm feeds both attention and MLP (Phi-2, Falcon, Cohere)."""
    residual_scale: Finite = 1.0
    """Factor on each branch before it joins the residual stream (Granite)."""
    dropout: Probability = 0.0
    """Dropout on each branch before it joins the residual stream, in training only."""

    @property
    def pre(self) -> bool:
        """Whether branches read a normed input."""
        return self.placement != "post"

    @property
    def post(self) -> bool:
        """Whether branch outputs are normed."""
        return self.placement != "pre"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shared_norm and not self.parallel:
            raise ValueError("shared_norm needs parallel: true")
        if self.shared_norm and not self.pre:
            raise ValueError("shared_norm needs placement: pre or sandwich")
        return self


class LearnedPositions(Model):
    """A learned vector per position, added to the token embedding."""

    rows: Size | None = None
    """Rows of the table; none = context + offset."""
    offset: Annotated[int, Field(ge=0)] = 0
    """Added to the position before the look-up (OPT: 2)."""


class Embedding(Model):
    """From token ids to the residual stream: embed, scale, add positions, norm, dropout, in this order."""

    scale: Positive | None = None
    """Factor on the token embedding (Gemma: sqrt(width))."""
    positions: LearnedPositions | None = None
    """Learned absolute positions."""
    norm: Norm | None = None
    """A norm after the embedding (BLOOM)."""
    dropout: Probability = 0.0
    """Dropout on the result, in training only."""


class Head(Model):
    """From the residual stream to logits: linear, scale, softcap, in this order."""

    tied: bool = False
    """Whether the head shares the embedding matrix."""
    bias: bool = False
    """Whether the head has a bias (Phi-2)."""
    scale: Positive | None = None
    """Factor on the logits (Cohere; Granite's divisor is its inverse)."""
    softcap: Positive | None = None
    """c * tanh(logits / c) (Gemma 2)."""


class Init(Model):
    """Random initialisation: normal weights, zero biases, unit effective norm gains, zero sinks."""

    std: Positive = 0.02
    """Standard deviation of linear weights."""
    embed_std: Positive | None = None
    """Standard deviation of embeddings; none = std."""
    depth_scaled: bool = True
    """Divide the std of the residual outputs (attn.o, mlp.down, experts too) by sqrt(2 * depth) (GPT-2)."""


_RANGE = re.compile(r"(-?\d+)(?:\.\.(-?\d+))?")


class Spec(Model):
    """A decoder transformer."""

    version: int = VERSION
    """Version of this schema."""
    name: Annotated[str, Field(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]+$")] = "model"
    """A label of printable characters; nothing depends on it."""
    vocab_size: Size
    """Rows of the embedding."""
    width: Size
    """Width of the residual stream (d_model)."""
    depth: Annotated[int, Field(ge=1, le=4096, strict=True)]
    """Number of layers."""
    context: Annotated[int, Field(ge=2, lt=2**31, strict=True)]
    """Longest sequence that the model is meant for, in tokens."""
    embedding: Embedding = Embedding()
    block: Block
    """Every layer, unless `pattern` or `overrides` says otherwise."""
    pattern: tuple[dict[str, Any], ...] = ()
    """Repeated over the layers: entry i % len(pattern) is merged into layer i's block. `- {}` is a plain layer.
    Mappings merge field by field: local layers without the scaling of the others say `scaling: null`."""
    overrides: dict[str, dict[str, Any]] = {}
    """Layers that differ: '3', '-1' or '0..3' (inclusive) to a partial block, merged last."""
    final_norm: Norm | None = Norm()
    """Before the head."""
    head: Head = Head()
    init: Init = Init()

    _layers: tuple[Block, ...] = PrivateAttr(default=())

    @property
    def layers(self) -> tuple[Block, ...]:
        """One resolved block per layer, `depth` of them."""
        return self._layers

    @field_validator("overrides", mode="before")
    @classmethod
    def _string_keys(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        problems: list[Problem] = []
        layers: list[Block] = []
        base = self.block.model_dump(exclude_unset=True)
        chosen = list(self._override_layers(problems))
        seen: set[str] = set()
        for i in range(self.depth):
            raw, where = base, ["block"]
            if self.pattern:
                j = i % len(self.pattern)
                raw, where = merge(raw, self.pattern[j]), [f"pattern[{j}]"]
            for key, indices in chosen:
                if i in indices:
                    raw, where = merge(raw, self.overrides[key]), [f"overrides['{key}']"]
            try:
                layer = self._resolved(Block.model_validate(raw), ".".join(where), problems, seen)
                layers.append(layer)
            except ValidationError as e:
                for p in problems_from(e, raw, Block):
                    p = p.under(".".join(where))
                    if str(p) not in seen:
                        seen.add(str(p))
                        problems.append(p)
        self._check_whole(layers, problems)
        if problems:
            raise SpecError(problems)
        interned: dict[str, Block] = {}  # equal layers are one object, so a backend may key on identity
        self._layers = tuple(interned.setdefault(b.model_dump_json(), b) for b in layers)
        return self

    def _override_layers(self, problems: list[Problem]) -> Iterator[tuple[str, range]]:
        for key in self.overrides:
            path = f"overrides['{key}']"
            match = _RANGE.fullmatch(key)
            if not match:
                problems.append(Problem(path, key, "is no layer", "write '3', '-1' or '0..3'"))
                continue
            lo = int(match[1])
            hi = int(match[2]) if match[2] is not None else lo
            lo, hi = (n + self.depth if n < 0 else n for n in (lo, hi))
            if not 0 <= lo <= hi < self.depth:
                problems.append(Problem(path, key, f"is outside 0..{self.depth - 1}", "name layers that exist"))
                continue
            yield key, range(lo, hi + 1)

    def _resolved(self, b: Block, where: str, problems: list[Problem], seen: set[str]) -> Block:
        def bad(path: str, value: object, rule: str, fix: str) -> None:
            p = Problem(f"{where}.{path}", value, rule, fix)
            if str(p) not in seen:
                seen.add(str(p))
                problems.append(p)

        a, m = b.attention, b.mlp
        kv = a.kv_heads if a.kv_heads is not None else a.heads
        if a.heads % kv:
            near = [n for n in range(1, a.heads + 1) if a.heads % n == 0]
            near.sort(key=lambda n: (abs(n - kv), n))
            bad(
                "attention.kv_heads",
                kv,
                f"does not divide heads={a.heads}",
                "try " + " or ".join(str(n) for n in sorted(near[:2])),
            )
        head_dim = a.head_dim
        if head_dim is None:
            if self.width % a.heads:
                bad("attention.heads", a.heads, f"does not divide width={self.width}", "set attention.head_dim")
            head_dim = max(1, self.width // a.heads)
        if isinstance(a.position, Rope):
            rotary = a.position.rotary_dim(head_dim)
            if rotary < 2 or rotary % 2:
                bad(
                    "attention.position.fraction",
                    a.position.fraction,
                    f"rotates {rotary} of head_dim={head_dim} dimensions, and rotation works on pairs",
                    "choose a fraction and head_dim that give an even number of at least 2",
                )
            s = a.position.scaling
            if isinstance(s, LongRopeScaling):
                for field in ("short_factor", "long_factor"):
                    n = len(getattr(s, field))
                    if n != rotary // 2:
                        bad(
                            f"attention.position.scaling.{field}",
                            f"{n} values",
                            f"needs rotary_dim / 2 = {rotary // 2} values",
                            "one divisor for each frequency",
                        )
                if s.original_context < 2:
                    bad("attention.position.scaling.original_context", s.original_context, "must be at least 2", "")
            if isinstance(s, DynamicScaling) and rotary == 2:
                bad(
                    "attention.position.scaling.kind",
                    "dynamic",
                    "is undefined for 2 rotated dimensions",
                    "use a larger head_dim or kind: linear",
                )
            if isinstance(s, DynamicScaling | YarnScaling) and s.original_context is None:
                s = s.model_copy(update={"original_context": self.context})
                a = a.model_copy(update={"position": a.position.model_copy(update={"scaling": s})})
            if isinstance(s, LongRopeScaling) and s.attention_factor is None and s.original_context >= 2:
                from spec.rope import longrope_attention_factor

                factor = longrope_attention_factor(self.context, s.original_context)
                s = s.model_copy(update={"attention_factor": factor})
                a = a.model_copy(update={"position": a.position.model_copy(update={"scaling": s})})
        if m.bias.gate and not m.gated:
            m = m.model_copy(update={"bias": m.bias.model_copy(update={"gate": False})})
        scale = a.scale if a.scale is not None else head_dim**-0.5
        a = a.model_copy(update={"kv_heads": kv, "head_dim": head_dim, "scale": scale})
        return b.model_copy(update={"attention": a, "mlp": m})

    def _check_whole(self, layers: list[Block], problems: list[Problem]) -> None:
        p = self.embedding.positions
        if p is not None and p.rows is not None and p.rows < self.context + p.offset:
            problems.append(
                Problem(
                    "embedding.positions.rows",
                    p.rows,
                    f"is fewer than context + offset = {self.context + p.offset}",
                    "leave rows out, or lower context",
                )
            )
        if len(self.pattern) > self.depth:
            problems.append(
                Problem(
                    "pattern",
                    f"{len(self.pattern)} entries",
                    f"is longer than depth={self.depth}",
                    "drop the entries that no layer reaches",
                )
            )

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table (0 without one)."""
        p = self.embedding.positions
        return 0 if p is None else p.rows if p.rows is not None else self.context + p.offset

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything that changes the function (not the name, initialisation or dropout)."""
        data = {
            "version": self.version,
            **self.model_dump(include={"vocab_size", "width", "depth", "context", "embedding", "final_norm", "head"}),
            "layers": [b.model_dump() for b in self.layers],
        }
        return hashlib.sha256(json.dumps(_without_dropout(data), sort_keys=True).encode()).hexdigest()


def _without_dropout(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_dropout(v) for k, v in data.items() if k != "dropout"}
    return [_without_dropout(v) for v in data] if isinstance(data, list | tuple) else data


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `patch` laid over it, mapping by mapping.

    A position, scaling or MLP whose `kind` changes is replaced, not merged: fields of another kind do not carry over.
    """
    out = dict(copy.deepcopy(base))
    for key, value in patch.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            was = old.get("kind", "dense" if key == "mlp" else None)
            replaced = key in ("position", "scaling", "mlp") and value.get("kind", was) != was
            out[key] = dict(value) if replaced else merge(old, value)
        else:
            out[key] = copy.deepcopy(value)
    return out
