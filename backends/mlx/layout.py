"""Which tensors a folder has, where each canonical row goes, and what config.json says of it. r rows, c columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backends.base import Planned
from backends.mlx.container import Tensor
from backends.mlx.levels import FLOATS, GRID, Packing, packing
from spec.config import DynamicScaling, LongRopeScaling, Norm, Rope, Spec
from spec.levels import joined
from spec.params import Param, params

BUNDLED = "model.py"
"""The carrier that needs none of mlx-lm's architectures."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A canonical tensor inside a stored one."""

    name: str
    to: NDArray[np.intp]
    """The stored row of each of its rows."""
    add: float = 0.0
    """Added to every element (a gain's offset), rounded once."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A stored tensor: `name` without the parts that quantization makes of a matrix's `weight`."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    neutral: tuple[Piece, ...] = ()
    """What the architecture has and the spec has not, by the names it would have."""
    fill: float = 0.0
    """Stored there: a bias of 0, a gain of 1 less what the architecture adds."""
    experts: int = 0
    """Of how many experts it has the rows: then the file has one axis more, [experts, rows of each, ...]."""
    kept: Literal["", "f32", "compute"] = ""
    """Of a router: never quantized, in float32 or in the dtype of the activations whatever the level."""

    @property
    def matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def path(self) -> str:
        """The module."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Fit:
    """How a folder carries a spec."""

    carrier: str
    """mlx-lm's model type, or `BUNDLED`."""
    shipped: Spec
    """What the architecture computes with the stored rows: offsets are in the gains (or `offset`), what it always has
    is there, and rotary tables are config.json's."""
    slots: tuple[Slot, ...]
    config: Mapping[str, Any]
    """What config.json says of the architecture."""
    folds: tuple[str, ...] = ()
    offset: float = 0.0
    """What the architecture adds to stored gains itself."""
    traditional: bool = False
    """Whether its rotation turns neighbours, not halves."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A slot at its precision."""

    slot: Slot
    dtype: str
    """Of floats; of a quantized matrix's scales and biases."""
    packing: Packing | None
    level: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors in the file, by their part of the whole: `weight`, `scales`, `biases`, or only the whole, ``."""
        s, p = self.slot, self.packing
        lead = (s.experts, s.shape[0] // s.experts) if s.experts else s.shape[:1]
        if p is None:
            return {"": Tensor(s.name, self.dtype, (*lead, *s.shape[1:]))}
        cols = s.shape[1]
        scales = Tensor(f"{s.path}.scales", self.dtype if p.mode == "affine" else "U8", (*lead, cols // p.group))
        out = {"weight": Tensor(s.name, "U32", (*lead, cols * p.bits // 32)), "scales": scales}
        if p.mode == "affine":
            out["biases"] = Tensor(f"{s.path}.biases", self.dtype, scales.shape)
        return out


def arrange(slots: Sequence[Slot], planned: Sequence[Planned], compute: str) -> list[Stored]:
    """Every slot with its precision. Vectors take the dtype of the activations: MLX would compute in float32 where
    they were wider. A matrix made of pieces of several levels is stored at the one that takes all of them."""
    levels = {p.name: p.level for p in planned}
    out = []
    for s in slots:
        if s.kept or not s.matrix:
            out.append(Stored(s, "F32" if s.kept == "f32" else FLOATS[compute], None, "f32"))
            continue
        kinds = {levels[p.name] for p in s.pieces}
        assert len(kinds) == 1 or kinds <= set(GRID), f"{s.name} is made of {kinds}"
        level = kinds.pop() if len(kinds) == 1 else joined(kinds)
        out.append(
            Stored(s, FLOATS[level], None, level) if level in FLOATS
            else Stored(s, FLOATS[compute], packing(level, s.shape[1]), level)
        )  # fmt: skip
    return out


def quantization(stored: Sequence[Stored]) -> dict[str, Any]:
    """config.json's `quantization`: the commonest packing as the default, an entry for every module that differs."""
    packed = {t.slot.path: t.packing for t in stored if t.packing is not None}
    if not packed:
        return {}
    all_ = list(packed.values())
    common = max(dict.fromkeys(all_), key=all_.count)
    return {"quantization": {**common.entry, **{path: p.entry for path, p in packed.items() if p != common}}}


def whole(p: Param, name: str, add: float = 0.0) -> Slot:
    """A stored tensor of one canonical tensor. A router's are float32: its choices are no matter of rounding."""
    kept = "f32" if p.role == "router" or ".mlp.router." in p.name else ""
    return Slot(name, p.shape, (Piece(p.name, np.arange(p.shape[0]), add),), kept=kept)


def norms(spec: Spec) -> Iterator[tuple[str, Norm]]:
    """Every norm by its canonical name."""
    if spec.embedding.norm is not None:
        yield "embed_norm", spec.embedding.norm
    for i, b in enumerate(spec.layers):
        for name in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"):
            yield f"layers.{i}.{name}", b.norm
        if b.attention.qk_norm is not None:
            yield f"layers.{i}.attn.q_norm", b.attention.qk_norm
            yield f"layers.{i}.attn.k_norm", b.attention.qk_norm
    if spec.final_norm is not None:
        yield "final_norm", spec.final_norm


def offsets(spec: Spec) -> dict[str, float]:
    """The offset of every gain that has one."""
    return {f"{name}.weight": n.offset for name, n in norms(spec) if n.offset}


def without_offsets(spec: Spec) -> Spec:
    """The spec of the same function with gains that hold their offset."""
    if not offsets(spec):
        return spec
    data: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    blocks = [b.model_dump(mode="json") for b in spec.layers]
    data["embedding"] = spec.embedding.model_dump(mode="json")
    data["final_norm"] = None if spec.final_norm is None else spec.final_norm.model_dump(mode="json")
    for n in (
        data["embedding"]["norm"], data["final_norm"],
        *(n for b in blocks for n in (b["norm"], b["attention"]["qk_norm"])),
    ):  # fmt: skip
        if n is not None:
            n["offset"] = 0.0
    return Spec.model_validate(data | {"block": blocks[0], "pattern": blocks, "overrides": {}})


def fold_text(spec: Spec) -> tuple[str, ...]:
    """What `without_offsets` does, for people."""
    found = sorted(set(offsets(spec).values()))
    return (f"norm gains hold their offset of {', '.join(f'{o:g}' for o in found)}",) if found else ()


def fixed(spec: Spec) -> bool:
    """Whether rotary tables depend on the length of the session; here they are those of the whole context."""
    positions = [b.attention.position for b in spec.layers]
    return any(isinstance(p, Rope) and isinstance(p.scaling, DynamicScaling | LongRopeScaling) for p in positions)


def bundled(spec: Spec, compute: str) -> Fit:
    """Any spec: parameters under their canonical names, constants in config.json."""
    from backends.mlx.bundle import KEY, constants

    graph, add = without_offsets(spec), offsets(spec)
    slots = tuple(whole(p, p.name, add.get(p.name, 0.0)) for p in params(spec))
    heads = spec.layers[0].attention
    config = {
        "model_file": BUNDLED,  # and no model_type: transformers would look for it
        # what tools ask of any model
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": heads.heads,
        "num_key_value_heads": heads.kv_heads,
        "max_position_embeddings": spec.context,
        KEY: constants(graph, compute),
    }
    return Fit(BUNDLED, graph, slots, config, fold_text(spec))
