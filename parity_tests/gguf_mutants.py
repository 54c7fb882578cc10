"""Wrong artifacts: a correct GGUF file with one thing changed in place, as a buggy converter would have written it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parity_tests.shop import FileMutant

Bytes = NDArray[np.uint8]


class Editor:
    """A copy of a GGUF file whose metadata and tensors are changed where they lie."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path, "r+")

    def scalar(self, suffix: str, change: Callable[[float], float]) -> None:
        """Change the number whose key ends like this."""
        (field,) = [f for key, f in self._reader.fields.items() if key.endswith(suffix)]
        field.parts[field.data[0]][0] = change(field.parts[field.data[0]][0])

    def swap_tokens(self, first: bytes, second: bytes) -> None:
        """Exchange two tokens of equally many bytes."""
        field = self._reader.fields["tokenizer.ggml.tokens"]
        place = {bytes(field.parts[i]): i for i in field.data}
        a, b = field.parts[place[first]], field.parts[place[second]]
        a[:], b[:] = b.copy(), a.copy()

    def rows(self, name: str) -> Bytes:
        """A tensor's bytes as [rows, bytes of a row], writable."""
        (tensor,) = [t for t in self._reader.tensors if t.name == name]
        data = tensor.data
        return data.view(np.uint8).reshape(data.shape[0] if data.ndim > 1 else 1, -1)

    def close(self) -> None:
        """Write everything back."""
        self._reader.data.flush()  # type: ignore[attr-defined]


def _swap_heads(rows: Bytes, head_dim: int) -> None:
    rows[:head_dim], rows[head_dim : 2 * head_dim] = rows[head_dim : 2 * head_dim].copy(), rows[:head_dim].copy()


def _half_split_again(rows: Bytes, head_dim: int) -> None:
    """Undo the interleaving of rotated pairs: the row order of a converter that forgot it."""
    for h in range(0, len(rows), head_dim):
        head = rows[h : h + head_dim].copy()
        rows[h : h + head_dim] = np.concatenate([head[0::2], head[1::2]])


def _scale_of_block(rows: Bytes, factor: float) -> None:
    """Multiply the float16 scale of one block (the first of row 3)."""
    scale = rows[3, :2].copy().view("<f2")
    rows[3, :2] = (scale * np.float16(factor)).astype("<f2").view(np.uint8)


def _nibbles(rows: Bytes) -> None:
    """Exchange the halves of every byte of Q4_0 codes (18 bytes a block: a scale, then 16 bytes of codes)."""
    blocks = rows.reshape(len(rows), -1, 18)
    codes = blocks[..., 2:].copy()
    blocks[..., 2:] = (codes >> 4) | (codes << 4)


def _minus_one(rows: Bytes) -> None:
    gains = rows.view("<f4")
    gains -= 1


MUTANTS: dict[str, FileMutant[Editor]] = {
    "eps": FileMutant(lambda e: e.scalar("layer_norm_rms_epsilon", lambda x: x / 10), "graph"),
    "theta_0.1%": FileMutant(lambda e: e.scalar("rope.freq_base", lambda x: x * 1.001), "graph"),
    "kv_heads_swapped": FileMutant(lambda e: _swap_heads(e.rows("blk.0.attn_k.weight"), 64), "packing"),
    "rope_interleave_missed": FileMutant(
        lambda e: [_half_split_again(e.rows(f"blk.{i}.attn_{x}.weight"), 64) for i in range(2) for x in "qk"], "packing"
    ),
    "nibbles_swapped": FileMutant(lambda e: _nibbles(e.rows("blk.1.ffn_gate.weight")), "packing"),
    "one_scale_2%": FileMutant(lambda e: _scale_of_block(e.rows("blk.1.ffn_up.weight"), 1.02), "packing"),
    "rows_shifted": FileMutant(
        lambda e: e.rows("blk.0.ffn_up.weight").__setitem__(slice(None), np.roll(e.rows("blk.0.ffn_up.weight"), 1, 0)),
        "packing",
    ),
    "embedding_rows_shifted": FileMutant(
        lambda e: e.rows("token_embd.weight").__setitem__(slice(None), np.roll(e.rows("token_embd.weight"), 1, 0)),
        "packing",
    ),
    "norm_offset_missed": FileMutant(lambda e: _minus_one(e.rows("blk.0.attn_norm.weight")), "packing", "offset"),
    "norm_zero": FileMutant(lambda e: e.rows("output_norm.weight").fill(0), "packing"),
    "experts_exchanged": FileMutant(lambda e: _swap_heads(e.rows("blk.1.ffn_up_exps.weight"), 1), "packing", "moe"),
    "router_rows_shifted": FileMutant(
        lambda e: e.rows("blk.0.ffn_gate_inp.weight").__setitem__(
            slice(None), np.roll(e.rows("blk.0.ffn_gate_inp.weight"), 1, 0)
        ),
        "packing",
        "moe",
    ),
    "one_expert_more": FileMutant(lambda e: e.scalar("expert_used_count", lambda k: k + 1), "graph", "moe"),
    "weights_not_renormalised": FileMutant(
        lambda e: e.scalar("expert_weights_norm", lambda x: not x), "graph", "moe_chosen"
    ),
    "softmax_for_sigmoid": FileMutant(lambda e: e.scalar("expert_gating_func", lambda x: 1), "graph", "moe_chosen"),
    "expert_scale_1%": FileMutant(
        lambda e: e.scalar("expert_weights_scale", lambda x: x * 1.01), "graph", "moe_chosen"
    ),
    "correction_dropped": FileMutant(lambda e: e.rows("blk.1.exp_probs_b.bias").fill(0), "packing", "moe_chosen"),
    "shared_expert_dropped": FileMutant(
        lambda e: e.rows("blk.1.ffn_down_shexp.weight").fill(0), "packing", "moe_chosen"
    ),
    "shared_gate_dropped": FileMutant(
        lambda e: e.rows("blk.1.ffn_gate_inp_shexp.weight").fill(1), "packing", "moe_gate"
    ),
    "zeros_that_are_none": FileMutant(lambda e: e.rows("blk.1.ffn_up_shexp.weight").fill(1), "packing", "moe_plain"),
    "tokens_exchanged": FileMutant(lambda e: e.swap_tokens(b"a", b"b"), "tokenizer"),
    "bos_policy": FileMutant(lambda e: e.scalar("tokenizer.ggml.add_bos_token", lambda x: not x), "tokenizer"),
    "bos_id": FileMutant(lambda e: e.scalar("tokenizer.ggml.bos_token_id", lambda x: x + 1), "tokenizer"),
}
"""By name; the level and spec it is applied to, and the check that must say FAIL."""


def mutate(original: Path, out: Path, mutant: FileMutant[Editor]) -> Path:
    """A copy of the artifact with the bug in it."""
    shutil.copyfile(original, out)
    editor = Editor(out)
    mutant.change(editor)
    editor.close()
    return out
