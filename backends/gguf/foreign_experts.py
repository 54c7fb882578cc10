"""Mixtures of experts in a file of another program: the inverse of `backends.gguf.mixtures`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.gguf.carriers import Carrier, Experts, Need
from backends.gguf.container import Header, Info, read_rows
from backends.gguf.keys import REQUIRED, Keys
from backends.gguf.mixtures import GATING
from backends.gguf.pack import dense, unpack


class File(Protocol):
    """What is asked of the file that is being read."""

    c: Carrier
    k: Keys
    header: Header

    def part(self, need: Need, names: list[str], neutral: float = 0.0) -> list[bool]: ...


MLPs = list[dict[str, Any]]


def mixtures(file: File, depth: int) -> list[dict[str, Any] | None]:
    """The mixture of each layer; none where it is dense. Problems are noted with the keys."""
    c, k, x = file.c, file.k, file.c.experts
    layers = [i for i in range(depth) if f"blk.{i}.ffn_gate_inp.weight" in file.header.tensors]
    if x is None or not layers:
        _leading(k, x, layers, depth)
        return [None] * depth
    count, used = k.whole("expert_count"), k.layers("expert_used_count", depth, int)
    _leading(k, x, layers, depth)
    router = {**_router(k, x), "bias": all(_named(file, x.bias, layers, "ffn_gate_inp.bias"))}
    router["correction"] = all(_named(file, x.correction, layers, x.correction_name))
    biases = dict.fromkeys(("gate", "up", "down"), all(_named(file, x.expert_bias, layers, "ffn_up_exps.bias")))
    k.check()
    assert used
    out: list[dict[str, Any] | None] = [None] * depth
    for i in layers:
        up = file.header.tensors.get(f"blk.{i}.ffn_up_exps.weight")
        hidden = up.shape[-2] if up is not None and len(up.shape) == 3 else 0
        if not hidden:
            k.bad("expert_count", f"and blk.{i}.ffn_up_exps.weight is no tensor of experts")
            break
        out[i] = {
            "kind": "moe", "experts": count, "hidden": hidden, "gated": True, "activation": x.activation,
            "bias": biases, "router": {"top_k": used[i], **router}, "shared": _shared(file, x, i),
        }  # fmt: skip
    _widths(k, c, x, [m for m in out if m])
    return out


def _named(file: File, need: Need, layers: list[int], name: str) -> list[bool]:
    return file.part(need, [f"blk.{i}.{name}" for i in layers]) if need != "no" else [False]


def _leading(k: Keys, x: Experts | None, layers: list[int], depth: int) -> None:
    """How many dense layers come first has to be how many there are."""
    first = layers[0] if layers else depth
    if x is not None and x.layers == "leading" and k.whole("leading_dense_block_count", 0) != first:
        k.bad("leading_dense_block_count", f"is not the number of layers before the first with a router, {first}")


def _router(k: Keys, x: Experts) -> dict[str, Any]:
    scores = {n: name for name, n in GATING.items()}
    first, *others = x.score
    score: str | None = first
    if others:
        named = k.whole("expert_gating_func", 0 if x.default_score else REQUIRED)
        score = scores.get(named) if named else x.default_score or None
    elif k.whole("expert_gating_func", GATING[first]) not in (0, GATING[first]):
        score = None
    if score is None:
        k.bad("expert_gating_func", "is no way to score experts that is read", "1: softmax, 2: sigmoid")
    renormalise = k.flag("expert_weights_norm", bool(x.renormalise))
    if x.renormalise is not None and renormalise != x.renormalise:
        k.bad("expert_weights_norm", f"is not what llama.cpp's {k.arch} does")
    scale = k.number("expert_weights_scale", 0.0) or 1.0
    if scale != 1 and not x.scale:
        k.bad("expert_weights_scale", f"is not read by llama.cpp's {k.arch}")
    return {"score": score, "renormalise": renormalise, "scale": scale}


def _shared(file: File, x: Experts, i: int) -> dict[str, Any] | None:
    """A shared expert of zeros, which stands for none, is none."""
    tensors = file.header.tensors
    up, down = (tensors.get(f"blk.{i}.ffn_{n}_shexp.weight") for n in ("up", "down"))
    if x.shared == "no" or up is None or down is None:
        return None
    if not _rows(down, 0, 1).any() and not any(_rows(down, r, r + 1).any() for r in range(down.rows)):
        return None
    return {"hidden": up.shape[0] // (2 if x.shared_fused else 1), "gate": x.shared_gate}


def _rows(info: Info, start: int, stop: int) -> NDArray[np.float32]:
    with info.file.open("rb") as f:
        return dense(unpack(read_rows(f, info, start, stop), info.type))


def _widths(k: Keys, c: Carrier, x: Experts, found: MLPs) -> None:
    """What the metadata says of widths has to be what the tensors have."""
    if not found:
        return
    hidden, shared = found[0]["hidden"], found[0]["shared"]
    mine: dict[str, Callable[[int], bool]] = {
        "expert_feed_forward_length": lambda v: v in (0, hidden),
        "expert_shared_feed_forward_length": lambda v: shared is None or v in (0, shared["hidden"]),
        "expert_shared_count": lambda v: shared is None or x.shared_hidden != "multiple"
        or v * hidden == shared["hidden"],
    }  # fmt: skip
    for key, fits in mine.items():
        value = k.raw(key, 0)
        values = value if isinstance(value, list) else [value]
        if not all(type(v) is int and (fits(v) or v == 0) for v in values):
            k.bad(key, f"is not what the tensors have: experts {hidden} wide, shared {shared and shared['hidden']}")
    for key in ("expert_group_count", "expert_group_used_count"):
        if k.whole(key, 0) not in (0, 1):
            k.bad(key, "is not supported (experts in groups)")
