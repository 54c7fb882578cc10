"""Wrong MLX folders: a correct one with one thing changed in place, and conversions with one mistake in their code, as
writer and reader would share it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import QuantizedTensor
from backends.mlx import build, choose, layout, pack, rotary
from backends.safetensors import STORED
from parity_tests.shop import FileMutant

HEAD = 64
"""head_dim of the specs that these are for."""


class Editor:
    """A copy of a folder whose files are changed where they lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path / "model.safetensors"
        self._size = int.from_bytes(self._file.read_bytes()[:8], "little")
        self._header = json.loads(self._file.read_bytes()[8 : 8 + self._size])

    def json(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file."""
        data = json.loads((self.path / file).read_text(encoding="utf-8"))
        change(data)
        (self.path / file).write_text(json.dumps(data), encoding="utf-8")

    def rows(self, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Change a tensor: [rows, ...] as it is stored."""
        t = self._header[name]
        at, end = (8 + self._size + x for x in t["data_offsets"])
        data = bytearray(self._file.read_bytes())
        old = np.frombuffer(bytes(data[at:end]), STORED[t["dtype"]]).reshape(t["shape"])
        data[at:end] = np.ascontiguousarray(change(old.copy())).tobytes()
        self._file.write_bytes(data)


def _set(file: str, **fields: Any) -> Callable[[Editor], None]:
    return lambda e: e.json(file, lambda data: data.update(fields))


def _config(**fields: Any) -> Callable[[Editor], None]:
    return _set("config.json", **fields)


def _without(file: str, field: str) -> Callable[[Editor], None]:
    return lambda e: e.json(file, lambda data: data.pop(field))


def _tensor(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Editor], None]:
    return lambda e: e.rows(f"model.{name}", change)


def _parts(module: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Editor], None]:
    """The same change of rows in all parts of a quantized matrix."""

    def changed(e: Editor) -> None:
        for part in ("weight", "scales", "biases"):
            e.rows(f"model.{module}.{part}", change)

    return changed


def _swapped(x: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([x[HEAD : 2 * HEAD], x[:HEAD], x[2 * HEAD :]])


def _unpaired(x: NDArray[Any]) -> NDArray[Any]:
    """The order of rows of a converter that forgot that mlx-lm's partial rotation pairs the whole head."""
    head = np.argsort(np.concatenate([np.arange(16), np.arange(32, 48), np.arange(16, 32), np.arange(48, 64)]))
    return x.reshape(-1, HEAD, *x.shape[1:])[:, head].reshape(x.shape)


def _nibbles(x: NDArray[Any]) -> NDArray[Any]:
    return ((x >> 4) & 0x0F0F0F0F) | ((x & 0x0F0F0F0F) << 4)


def _one_scale(x: NDArray[Any]) -> NDArray[Any]:
    x[3, 1] += 8  # float16 bits: 8 units of the last place
    return x


def _module_entry(e: Editor) -> None:
    """A module of 4 bits declared as one of 8."""
    entry = {"group_size": 32, "bits": 8, "mode": "affine"}
    e.json("config.json", lambda data: data["quantization"].update({"model.layers.1.mlp.up_proj": entry}))


FILES: dict[str, FileMutant[Editor]] = {
    "theta_0.1%": FileMutant(_config(rope_theta=10010.0), "graph"),
    "theta_unproved": FileMutant(_config(rope_theta=10010.0), "packing"),
    "partial_fraction": FileMutant(
        _config(rope_scaling={"rope_type": "proportional", "partial_rotary_factor": 0.25}), "graph", "partial"
    ),
    "eps": FileMutant(_config(rms_norm_eps=1e-4), "packing"),
    "tied_flag": FileMutant(_config(tie_word_embeddings=True), "packing"),
    "torch_dtype": FileMutant(_config(torch_dtype="bfloat16"), "packing"),
    "extra_key": FileMutant(_config(sliding_window=16), "packing"),
    "missing_key": FileMutant(_without("config.json", "max_position_embeddings"), "packing"),
    "eos_id": FileMutant(_config(eos_token_id=5), "packing"),
    "bos_id": FileMutant(_config(bos_token_id=5), "packing"),
    "pad_id_missing": FileMutant(_without("config.json", "pad_token_id"), "packing"),
    "generation_eos": FileMutant(_set("generation_config.json", eos_token_id=5), "packing"),
    "generation_sampling": FileMutant(_set("generation_config.json", temperature=2.0), "packing"),
    "bos_policy": FileMutant(_set("tokenizer_config.json", add_bos_token=False), "packing"),
    "module_entry": FileMutant(_module_entry, "packing"),
    "default_entry": FileMutant(
        lambda e: e.json("config.json", lambda data: data["quantization"].update(bits=8)), "packing"
    ),
    "kv_heads_swapped": FileMutant(_parts("layers.0.self_attn.k_proj", _swapped), "packing"),
    "rows_not_permuted": FileMutant(_parts("layers.1.self_attn.q_proj", _unpaired), "packing", "partial"),
    "nibbles_swapped": FileMutant(_tensor("layers.1.mlp.gate_proj.weight", _nibbles), "packing"),
    "one_scale": FileMutant(_tensor("layers.1.mlp.up_proj.scales", _one_scale), "packing"),
    "rows_shifted": FileMutant(_parts("layers.0.mlp.up_proj", lambda x: np.roll(x, 1, 0)), "packing"),
    "embedding_rows_shifted": FileMutant(_parts("embed_tokens", lambda x: np.roll(x, 1, 0)), "packing"),
    "norm_offset_missed": FileMutant(_tensor("layers.0.input_layernorm.weight", lambda x: x - 1), "packing", "offset",
                                     "f32"),
    "qk_offset_missed": FileMutant(_tensor("layers.0.self_attn.q_norm.weight", lambda x: x - 1), "packing", "offset",
                                   "f32"),
    "neutral_gain": FileMutant(_tensor("layers.0.self_attn.k_norm.weight", lambda x: x * 2), "packing", "neutral",
                               "f32"),
    "experts_exchanged": FileMutant(
        _parts("layers.1.block_sparse_moe.switch_mlp.up_proj", lambda x: x[[1, 0, *range(2, len(x))]]), "packing",
        "moe",
    ),
    "one_expert_more": FileMutant(_config(num_experts_per_tok=3), "packing", "moe"),
    "router_rows_shifted": FileMutant(
        _tensor("layers.0.block_sparse_moe.gate.weight", lambda x: np.roll(x, 1, 0)), "packing", "moe"
    ),
    "router_quantized": FileMutant(
        lambda e: e.json("config.json", lambda data: data["quantization"].update(
            {"model.layers.0.block_sparse_moe.gate": {"group_size": 32, "bits": 8, "mode": "affine"}}
        )), "packing", "moe",
    ),
    "weights_not_renormalised": FileMutant(_config(norm_topk_prob=False), "packing", "moe_qwen3"),
    "shared_gate_dropped": FileMutant(
        _tensor("layers.1.mlp.shared_expert_gate.weight", lambda x: x * 0), "packing", "moe_gate"
    ),
    "correction_dropped": FileMutant(
        lambda e: e.rows("layers.1.mlp.router.correction", lambda x: x * 0), "packing", "moe_bundled"
    ),
    "softmax_for_sigmoid": FileMutant(
        lambda e: e.json("config.json", _softmax), "packing", "moe_bundled"
    ),
    "bundled_softcap": FileMutant(lambda e: e.json("config.json", _half_softcap), "packing", "bundled"),
}  # fmt: skip
"""By name; the spec and level that it is applied to, and the check that must say FAIL."""


def _softmax(data: dict[str, Any]) -> None:
    data["allotrope"]["spec"]["blocks"][0]["mlp"]["router"]["score"] = "softmax"


def _half_softcap(data: dict[str, Any]) -> None:
    data["allotrope"]["spec"]["head"]["softcap"] /= 2


def mutate(original: Path, out: Path, mutant: FileMutant[Editor]) -> Path:
    """A copy of the folder with the bug in it."""
    shutil.copytree(original, out)
    mutant.change(Editor(out))
    return out


Patch = pytest.MonkeyPatch


def _qk_norms_forgotten(m: Patch) -> None:
    plain = layout.norms

    def norms(spec: Any) -> Iterator[tuple[str, Any]]:
        yield from ((n, x) for n, x in plain(spec) if not n.endswith(("q_norm", "k_norm")))

    m.setattr(layout, "norms", norms)


def _offsets(change: Callable[[float], float]) -> Callable[[Patch], None]:
    def seed(m: Patch) -> None:
        plain = layout.offsets
        for module in (layout, choose):
            m.setattr(module, "offsets", lambda spec: {n: change(x) for n, x in plain(spec).items()})

    return seed


def _rows(change: Callable[[NDArray[Any], int], NDArray[Any]]) -> Callable[[Patch], None]:
    def seed(m: Patch) -> None:
        plain = rotary.rows

        def rows(a: Any, heads: int, **kinds: bool) -> NDArray[Any]:
            return change(plain(a, heads, **kinds), a.head_dim)

        m.setattr(rotary, "rows", rows)

    return seed


def _first_heads_swapped(rows: NDArray[Any], k: int) -> NDArray[Any]:
    return rows if len(rows) != 2 * k else np.concatenate([rows[k : 2 * k], rows[:k], rows[2 * k :]])


def _other_theta(m: Patch) -> None:
    plain = rotary.configured

    def configured(spec: Any, a: Any) -> Any:
        found = plain(spec, a)
        return found and found | {"rope_theta": found["rope_theta"] * 1.001}

    m.setattr(rotary, "configured", configured)


def _first_experts_swapped(m: Patch) -> None:
    plain = choose._rows

    def rows(c: Any, s: Any, i: int, module: str, have: Any) -> NDArray[np.intp]:
        found = plain(c, s, i, module, have)
        if module != "mlp.experts.down":
            return found
        by_expert = found.reshape(s.layers[i].mlp.experts, -1)
        return by_expert[[1, 0, *range(2, len(by_expert))]].reshape(-1)

    m.setattr(choose, "_rows", rows)


def _gains_of_zero(m: Patch) -> None:
    plain = choose._slots
    m.setattr(choose, "_slots", lambda *a: [replace(s, fill=0.0) for s in plain(*a)])


def _other_nibbles(m: Patch) -> None:
    """In the writer and in the reader."""
    into, back = pack.from_grid, pack.to_grid

    def turned(parts: pack.Parts) -> pack.Parts:
        return parts | {"weight": _nibbles(parts["weight"]).astype("<u4")}

    m.setattr(pack, "from_grid", lambda q, p, *a: turned(into(q, p, *a)) if p.bits == 4 else into(q, p, *a))
    m.setattr(pack, "to_grid", lambda x, p, *a: back(turned(x) if p.bits == 4 else x, p, *a))


def _shifted_codes(m: Patch) -> None:
    """A bias of 7 scales, not 8."""
    plain = pack.from_grid

    def from_grid(q: QuantizedTensor, *a: Any) -> pack.Parts:
        parts = plain(q, *a)
        return parts | {"biases": (parts["biases"] * np.float32(0.875)).astype(parts["biases"].dtype)}

    m.setattr(pack, "from_grid", from_grid)


def _shifted_rows(m: Patch) -> None:
    """Every block one row too low, the last one elsewhere."""
    plain = build.MLXWriter._scatter

    def scatter(self: Any, t: Any, part: str, to: NDArray[Any], data: NDArray[Any]) -> None:
        plain(self, t, part, (to + 1) % t.slot.shape[0] if t.slot.matrix else to, data)

    m.setattr(build.MLXWriter, "_scatter", scatter)


@dataclass(frozen=True)
class CodeMutant:
    """A mistake that the conversion and the reading of its artifact share, and which check must notice."""

    seed: Callable[[Patch], None]
    killer: str
    feature: str
    level: str = "f32"


CODE: dict[str, CodeMutant] = {
    "qk_offset_forgotten": CodeMutant(_qk_norms_forgotten, "graph", "offset"),
    "qk_offset_forgotten_bundled": CodeMutant(_qk_norms_forgotten, "graph", "offset_bundled"),
    "offset_twice": CodeMutant(_offsets(lambda x: 2 * x), "graph", "offset"),
    "no_offset": CodeMutant(_offsets(lambda x: 0.0), "graph", "offset_bundled"),
    "rows_not_permuted": CodeMutant(_rows(lambda rows, k: np.arange(len(rows))), "graph", "partial"),
    "neighbours_not_permuted": CodeMutant(_rows(lambda rows, k: np.arange(len(rows))), "graph", "cohere"),
    "kv_heads_swapped": CodeMutant(_rows(_first_heads_swapped), "graph", "llama"),
    "theta_0.1%": CodeMutant(_other_theta, "graph", "partial"),
    "theta_unproved": CodeMutant(_other_theta, "packing", "partial"),
    "neutral_gains_of_zero": CodeMutant(_gains_of_zero, "graph", "neutral"),
    "nibbles": CodeMutant(_other_nibbles, "graph", "llama", "q4"),
    "bias_of_a_group": CodeMutant(_shifted_codes, "packing", "llama", "q4"),
    "rows_shifted": CodeMutant(_shifted_rows, "packing", "llama"),
    "experts_exchanged": CodeMutant(_first_experts_swapped, "graph", "moe"),
}
