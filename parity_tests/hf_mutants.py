"""Wrong folders: a correct conversion with one thing changed in place, as a buggy converter would have written it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.hf.build import SCALES
from backends.safetensors import STORED

Array = NDArray[Any]
Json = dict[str, Any]


class Editor:
    """A folder whose JSON files and tensors are changed where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, change: Callable[[Json], Any], name: str = "config.json") -> None:
        """Change a JSON file."""
        file = self.folder / name
        data = json.loads(file.read_text(encoding="utf-8"))
        change(data)
        file.write_text(json.dumps(data), encoding="utf-8")

    def tensor(self, name: str, change: Callable[[Array], Array], file: str = "model.safetensors") -> None:
        """Replace a tensor by what `change` makes of it, shape and dtype kept (bfloat16 and packed codes as words)."""
        path = self.folder / file
        data = bytearray(path.read_bytes())
        first = 8 + int.from_bytes(data[:8], "little")
        entry = json.loads(data[8:first])[name]
        start, stop = (first + n for n in entry["data_offsets"])
        x = np.frombuffer(bytes(data[start:stop]), STORED[entry["dtype"]]).reshape(entry["shape"])
        new = np.asarray(change(x.copy()), x.dtype)
        assert new.shape == x.shape
        data[start:stop] = new.tobytes()
        path.write_bytes(bytes(data))

    def swap(self, a: str, b: str) -> None:
        """Exchange two tensors of one shape."""
        kept: dict[str, Array] = {}
        for name in (a, b):
            self.tensor(name, lambda x, name=name: kept.setdefault(name, x))
        self.tensor(a, lambda x: kept[b])
        self.tensor(b, lambda x: kept[a])


LAYER = "model.layers.{}."


def heads_exchanged(x: Array) -> Array:
    """The first two heads of 64 rows."""
    return np.concatenate([x[64:128], x[:64], x[128:]])


def interleaved(head_dim: int) -> Callable[[Array], Array]:
    """Rows of rotated heads as neighbours, which this architecture keeps half-split."""
    return lambda x: x.reshape(-1, 2, head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def half_split(head_dim: int) -> Callable[[Array], Array]:
    """The inverse: what a converter that forgot to interleave writes."""
    return lambda x: x.reshape(-1, head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def nibbles(x: Array) -> Array:
    """The two codes of every byte exchanged."""
    data = np.ascontiguousarray(x).view(np.uint8)
    return ((data >> 4) | (data << 4)).view(x.dtype)


def one_scale(x: Array) -> Array:
    """One group's scale 2% larger."""
    x[3, 0] *= x.dtype.type(1.02)
    return x


def shifted(x: Array) -> Array:
    """Every row one further down."""
    return np.roll(x, 1, 0)


def both(e: Editor, name: str, change: Callable[[Array], Array]) -> None:
    """Rows of a packed product: its codes and its scales alike."""
    for part in ("packed", "scale"):
        e.tensor(f"{name}.weight_{part}", change)


def scaled(key: str, factor: float) -> Callable[[Json], None]:
    """Multiply a number; dots lead into nested objects."""
    *outer, last = key.split(".")

    def change(data: Json) -> None:
        for name in outer:
            data = data[name]
        data[last] *= factor

    return change


def put(**keys: Any) -> Callable[[Json], None]:
    """Set keys, or add them."""
    return lambda data: data.update(keys)


def exchange_tokens(data: Json) -> None:
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@dataclass(frozen=True)
class FolderMutant:
    """What is done to a folder, and the checks that must notice."""

    change: Callable[[Editor], Any]
    killers: tuple[str, ...] = ("packing",)
    feature: str = "llama"
    level: str = "q4"


def _config(change: Callable[[Json], Any], *killers: str, **of: str) -> FolderMutant:
    return FolderMutant(lambda e: e.json(change), ("packing", *killers), **of)


MUTANTS: dict[str, FolderMutant] = {
    "theta_0.1%": _config(scaled("rope_parameters.rope_theta", 1.001), "graph"),
    "eps": _config(scaled("rms_norm_eps", 0.1), "graph"),
    "activation": _config(put(hidden_act="gelu"), "graph"),
    "scaling_added": _config(put(rope_scaling={"rope_type": "linear", "factor": 2.0})),
    "scaling_inside": _config(lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0), "graph"),
    "scores_by_layer": _config(put(scale_attn_by_inverse_layer_idx=True), "graph", feature="gpt2", level="f16"),
    "scores_unscaled": _config(put(scale_attn_weights=False), "graph", feature="gpt2", level="f16"),
    "windows_exchanged": _config(lambda c: c["layer_types"].reverse(), "graph", feature="windows", level="f16"),
    "key_lost": _config(lambda c: c.pop("rope_parameters"), feature="offset"),
    "bits": _config(lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8)),
    "end_of_config": _config(scaled("eos_token_id", 2)),
    "end_of_generation": FolderMutant(lambda e: e.json(put(eos_token_id=2), "generation_config.json")),
    "bos_policy": FolderMutant(lambda e: e.json(put(add_bos_token=False), "tokenizer_config.json")),
    "tokens_exchanged": FolderMutant(lambda e: e.json(exchange_tokens, "tokenizer.json"), ("tokenizer",)),
    "kv_heads_swapped": FolderMutant(lambda e: both(e, LAYER.format(0) + "self_attn.k_proj", heads_exchanged)),
    "rows_interleaved": FolderMutant(
        lambda e: [both(e, f"{LAYER.format(i)}self_attn.{x}_proj", interleaved(64)) for i in range(2) for x in "qk"]
    ),
    "interleave_missed": FolderMutant(
        lambda e: [e.tensor(f"{LAYER.format(0)}self_attn.{x}_proj.weight", half_split(64)) for x in "qk"],
        feature="sandwich", level="bf16",
    ),
    "k_and_v_swapped": FolderMutant(
        lambda e: e.swap(*(f"{LAYER.format(0)}self_attn.{x}_proj.weight_packed" for x in "kv"))
    ),
    "norms_swapped": FolderMutant(
        lambda e: e.swap(*(f"{LAYER.format(1)}{x}_layernorm.weight" for x in ("input", "post_attention")))
    ),
    "norm_zero": FolderMutant(lambda e: e.tensor("model.norm.weight", np.zeros_like)),
    "nibbles_swapped": FolderMutant(lambda e: e.tensor(LAYER.format(1) + "mlp.gate_proj.weight_packed", nibbles)),
    "one_scale_2%": FolderMutant(lambda e: e.tensor(LAYER.format(1) + "mlp.up_proj.weight_scale", one_scale)),
    "one_scale_beside_2%": FolderMutant(lambda e: e.tensor("embed.weight", one_scale, SCALES)),
    "rows_shifted": FolderMutant(lambda e: both(e, LAYER.format(0) + "mlp.up_proj", shifted)),
    "embedding_rows_shifted": FolderMutant(lambda e: e.tensor("model.embed_tokens.weight", shifted)),
    "offset_missed": FolderMutant(
        lambda e: e.tensor(LAYER.format(0) + "input_layernorm.weight", lambda x: x - 1), feature="offset"
    ),
    "transpose_missed": FolderMutant(
        lambda e: e.tensor("transformer.h.0.attn.c_proj.weight", lambda x: x.T), feature="gpt2", level="f16"
    ),
}  # fmt: skip
"""By name; the level and spec it is applied to, and the checks that must say FAIL."""


def mutate(original: Path, out: Path, mutant: FolderMutant) -> Path:
    """A copy of the folder with the bug in it."""
    shutil.copytree(original, out)
    mutant.change(Editor(out))
    return out
