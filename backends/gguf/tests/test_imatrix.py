"""Importance files: written as `llama-imatrix` does, read from either of its formats, and never guessed at."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.gguf import imatrix
from backends.gguf.ggml import library
from backends.gguf.importance import FLOOR, conditioned
from spec import Spec, load, parse
from spec.errors import UserError
from spec.params import params

MOE = {
    "vocab_size": 64, "width": 64, "depth": 2, "context": 32,
    "block": {
        "attention": {"heads": 4, "kv_heads": 2},
        "mlp": {"kind": "moe", "experts": 3, "hidden": 32, "router": {"top_k": 2}},
    },
}  # fmt: skip


def measured(spec: Spec) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int64]]]:
    """Random mean squares and counts of every matrix of the layers; of each stack the second expert saw nothing."""
    rng = np.random.default_rng(0)
    found, counts = {}, {}
    for p in params(spec):
        if not p.matrix or not p.name.startswith("layers."):
            continue
        experts = 3 if ".experts." in p.name else 0
        shape = (experts, p.shape[-1]) if experts else (p.shape[-1],)
        found[p.name] = rng.lognormal(0, 2, shape).astype(np.float32)
        counts[p.name] = np.array([7, 0, 9_000_001] if experts else [1000], np.int64)
        if experts:
            found[p.name][1] = 0
    return found, counts


def write(path: Path, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    found, counts = measured(spec)
    n = imatrix.write(path, spec, found.get, counts.get, datasets=("a.txt",), tokens=1000, chunk=512)
    assert n == len(imatrix.read(path).entries)
    return found, counts


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    spec = parse(MOE)
    found, counts = write(tmp_path / "a.gguf", spec)
    got = imatrix.read(tmp_path / "a.gguf")
    assert (got.datasets, got.chunks, got.chunk_size) == (["a.txt"], 2, 512)
    entries = imatrix.matched(spec, got)
    assert set(entries) == {n for n in found if ".router." not in n}
    for name, entry in entries.items():
        means = got.means(entry)
        np.testing.assert_allclose(means, np.atleast_2d(found[name]), rtol=2e-7, err_msg=name)
        tokens = got.counts(entry)
        assert tokens is not None
        np.testing.assert_array_equal(tokens, np.float32(counts[name]), err_msg=name)
        again = imatrix.means(imatrix.sums(means, tokens), tokens)
        np.testing.assert_array_equal(again, means, err_msg=f"{name}: written once more")


def test_llama_cpps_own_reader_finds_what_its_loader_wants(tmp_path: Path) -> None:
    """Keys, types and dimensions that `common_imatrix_load` checks, by ggml's functions that it calls."""
    import ctypes as c

    spec, path = parse(MOE), tmp_path / "a.gguf"
    write(path, spec)
    lib = library()

    class Params(c.Structure):
        _fields_ = (("no_alloc", c.c_bool), ("ctx", c.c_void_p))

    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = c.c_void_p, [c.c_char_p, Params]
    for f, result, *arguments in (
        (lib.gguf_find_key, c.c_int64, c.c_char_p), (lib.gguf_get_kv_type, c.c_int, c.c_int64),
        (lib.gguf_get_arr_type, c.c_int, c.c_int64), (lib.gguf_get_val_u32, c.c_uint32, c.c_int64),
        (lib.gguf_get_n_tensors, c.c_int64), (lib.gguf_get_tensor_name, c.c_char_p, c.c_int64),
        (lib.gguf_get_tensor_type, c.c_int, c.c_int64), (lib.gguf_get_tensor_size, c.c_size_t, c.c_int64),
    ):  # fmt: skip
        f.restype, f.argtypes = result, [c.c_void_p, *arguments]
    lib.gguf_free.argtypes = [c.c_void_p]
    file = lib.gguf_init_from_file(str(path).encode(), Params(True, None))
    assert file
    try:
        sets, chunks, size = (lib.gguf_find_key(file, key.encode()) for key in imatrix.KEYS)
        assert min(sets, chunks, size) >= 0 and lib.gguf_find_key(file, b"general.architecture") == -1
        assert lib.gguf_get_kv_type(file, sets) == 9 and lib.gguf_get_arr_type(file, sets) == 8
        assert (lib.gguf_get_val_u32(file, chunks), lib.gguf_get_val_u32(file, size)) == (2, 512)
        sizes = {}
        for i in range(lib.gguf_get_n_tensors(file)):
            assert lib.gguf_get_tensor_type(file, i) == 0
            sizes[lib.gguf_get_tensor_name(file, i).decode()] = lib.gguf_get_tensor_size(file, i)
        assert sizes["blk.1.ffn_down_exps.weight.in_sum2"] == 4 * 3 * 32
        assert sizes["blk.1.ffn_down_exps.weight.counts"] == 4 * 3
        assert sizes["blk.0.attn_output.weight.counts"] == 4
        assert not any(n.startswith(("output", "token_embd")) or "_inp" in n for n in sizes)
    finally:
        lib.gguf_free(file)


def dat(path: Path, entries: dict[str, tuple[int, NDArray[np.float32]]], tail: bytes = b"") -> Path:
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        out += values.astype("<f4").tobytes()
    path.write_bytes(out + tail)
    return path


def test_the_older_format_is_read(tmp_path: Path) -> None:
    spec = parse(MOE)
    x, e = np.arange(1, 65, dtype=np.float32), np.arange(192, dtype=np.float32)
    tail = struct.pack("<i", 12) + struct.pack("<i", 6) + b"wiki.x"
    entries = {"blk.0.attn_q.weight": (4, x), "blk.0.ffn_up_exps.weight": (2, e)}
    got = imatrix.read(dat(tmp_path / "imatrix.dat", entries, tail))
    assert (got.chunks, got.datasets) == (12, ["wiki.x"])
    np.testing.assert_array_equal(got.means("blk.0.attn_q.weight"), x[None] / 4)
    names = imatrix.matched(spec, got)
    assert names["layers.0.attn.v.weight"] == "blk.0.attn_q.weight", "q, k and v have one input"
    assert names["layers.0.mlp.experts.gate.weight"] == "blk.0.ffn_up_exps.weight"
    assert got.counts("blk.0.attn_q.weight") is None


def test_a_fused_matrix_lends_its_importance_to_its_parts(tmp_path: Path) -> None:
    fused, parts = load("gpt2"), load("tiny")
    width = parts.width
    entries = {"blk.0.attn_qkv.weight": (1, np.ones(width, np.float32))}
    names = imatrix.matched(parts, imatrix.read(dat(tmp_path / "a.dat", entries)))
    assert set(names) == {f"layers.0.attn.{n}.weight" for n in "qkv"}
    entries = {"blk.0.attn_k.weight": (1, np.ones(fused.width, np.float32))}
    names = imatrix.matched(fused, imatrix.read(dat(tmp_path / "b.dat", entries)))
    assert set(names) == {f"layers.0.attn.{n}.weight" for n in "qkv"}


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    spec = parse(MOE)
    narrow = imatrix.read(dat(tmp_path / "a.dat", {"blk.0.attn_q.weight": (1, np.ones(32, np.float32))}))
    with pytest.raises(UserError, match=r"attn_q.weight: 32 numbers, where the model has 1 x 64 .*another model"):
        imatrix.matched(spec, narrow)
    few = imatrix.read(dat(tmp_path / "b.dat", {"blk.0.ffn_up_exps.weight": (1, np.ones(128, np.float32))}))
    with pytest.raises(UserError, match=r"128 numbers, where the model has 3 x 64"):
        imatrix.matched(spec, few)
    other = imatrix.read(dat(tmp_path / "c.dat", {"enc.0.attn_q.weight": (1, np.ones(64, np.float32))}))
    with pytest.raises(UserError, match="no entry is of a matrix of this model"):
        imatrix.matched(spec, other)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_numbers_that_are_no_sums_of_squares_are_refused(value: float, tmp_path: Path) -> None:
    bad = np.ones(64, np.float32)
    bad[5] = value
    got = imatrix.read(dat(tmp_path / "a.dat", {"blk.0.attn_q.weight": (1, bad)}))
    with pytest.raises(UserError, match="holds what is no sum of squares"):
        got.means("blk.0.attn_q.weight")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    spec = parse(MOE)
    write(tmp_path / "a.gguf", spec)
    whole = dat(tmp_path / "a.dat", {"blk.0.attn_q.weight": (1, np.ones(64, np.float32))}).read_bytes()
    gguf = (tmp_path / "a.gguf").read_bytes()
    bad = tmp_path / "bad"
    for data, stops in ((whole, range(len(whole))), (gguf, range(0, len(gguf), 97))):
        for stop in stops:
            bad.write_bytes(data[:stop])
            with pytest.raises(UserError):
                imatrix.read(bad)


def test_a_model_is_no_importance_file(tmp_path: Path) -> None:
    import gguf

    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_tensor("output.weight", np.ones((4, 4), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(UserError, match=r"no importance matrix: it has no imatrix.datasets \(general.type is llama"):
        imatrix.read(tmp_path / "m.gguf")


def test_rows_know_their_expert() -> None:
    found = np.array([[1, 8], [0, 0], [3, 0]], np.float32)
    got = conditioned(found, (12, 2))
    assert got.rows == 4
    np.testing.assert_array_equal(got.values, np.array([[0.25, 2], [1, 1], [3, FLOOR]], np.float32))
    runs = [(a, z, w.tolist()) for a, z, w in got.runs(3, 6)]
    assert runs == [(0, 1, [0.25, 2]), (1, 5, [1, 1]), (5, 6, [3, float(np.float32(FLOOR))])]
