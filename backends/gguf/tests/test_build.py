"""The writer: any order, any blocks, nothing lost, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Planned, QuantizedTensor
from backends.gguf.build import RECEIPT_KEY, SPEC_KEY, size, stamp, writer
from backends.gguf.container import read_header
from backends.gguf.ggml import quantize
from backends.gguf.pack import dense, pack, to_bf16, unpack
from backends.gguf.read import Artifact
from backends.gguf.runtime import load
from backends.gguf.types import BY_ID, TYPES, joined
from parity_tests.cases import FEATURES, random_weights
from spec import Spec, params
from spec.errors import UserError
from spec.load import parse, read_yaml


def planned(spec: Spec, level: str = "f32") -> list[Planned]:
    return [Planned(p.name, p.shape, level if p.matrix else "f32") for p in params(spec)]


def write(spec: Spec, weights: Any, path: Path, block: int, level: str = "f32", backwards: bool = False) -> bytes:
    out = writer(spec, planned(spec, level), None, path, metadata={}, threads=2)
    for p in sorted(params(spec), key=lambda p: p.name, reverse=backwards):
        x = weights[p.name]
        step = block if x.ndim > 1 else len(x)
        starts = range(0, len(x), step)
        for start in reversed(starts) if backwards else starts:
            out.write(p.name, start, x[start : start + step])
    out.close({"a": 1})
    return path.read_bytes()


@pytest.mark.parametrize("level", ["f32", "f16", "q5_0"])
@pytest.mark.parametrize("name", ["llama", "rope_partial", "gpt2", "norm_sandwich", "rms_offset"])
def test_blocks_and_their_order_change_nothing(name: str, level: str, tmp_path: Path) -> None:
    spec = FEATURES[name]
    weights = random_weights(spec)
    whole = write(spec, weights, tmp_path / "a.gguf", 10_000, level)
    assert write(spec, weights, tmp_path / "b.gguf", 5, level, backwards=True) == whole


def test_gguf_reads_what_was_written(tmp_path: Path) -> None:
    """An independent reader sees the tensors where ours put them."""
    from gguf import GGUFReader

    spec = FEATURES["llama"]
    weights = random_weights(spec)
    write(spec, weights, tmp_path / "m.gguf", 7)
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "m.gguf").tensors}
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], weights["layers.1.mlp.down.weight"])
    k = spec.layers[0].attention.head_dim or 0
    turned = weights["layers.0.attn.q.weight"].reshape(-1, 2, k // 2, spec.width).swapaxes(1, 2)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], turned.reshape(-1, spec.width))


def test_a_missing_row_is_our_bug(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, planned(spec), None, tmp_path / "m.gguf", metadata={}, threads=1)
    with pytest.raises(AssertionError, match="rows missing"):
        out.close({})
    out.abort()
    assert not (tmp_path / "m.gguf").exists()


def test_the_receipt_is_stamped_in_place(tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m.gguf"
    before = write(spec, random_weights(spec), path, 64)
    stamp(path, {"parity": "measured", "text": "é" * 100})
    after, header = path.read_bytes(), read_header(path)
    assert json.loads(header.keys[RECEIPT_KEY])["parity"] == "measured"
    assert len(after) == len(before)
    assert after[header.data :] == before[header.data :]
    with load(path) as runtime:
        assert runtime.vocab_size == spec.vocab_size


def test_the_spec_travels_in_the_file(tmp_path: Path) -> None:
    spec, path = FEATURES["local_theta"], tmp_path / "m.gguf"
    write(spec, random_weights(spec), path, 64)
    assert parse(read_yaml(read_header(path).keys[SPEC_KEY], "x")).hash == spec.hash
    assert Artifact(path).source == spec


def test_the_announced_size_is_the_size(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "window_pattern"):
        spec = FEATURES[name]
        data = write(spec, random_weights(spec), tmp_path / "m.gguf", 64, "f16")
        assert abs(size(spec, planned(spec, "f16"), None) - len(data)) < 512


def test_a_full_disk_shows_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    spec = FEATURES["llama"]
    with pytest.raises(UserError, match=r"No space left on device: needs 0\.\d MB"):
        writer(spec, planned(spec), None, tmp_path / "m.gguf", metadata={}, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, planned(spec, "f16"), None, tmp_path / "m.gguf", metadata={}, threads=1)
    with pytest.raises(UserError, match=r"layers\.0\.attn\.o\.weight: 100000 does not fit in float16"):
        out.write("layers.0.attn.o.weight", 0, np.full((32, 32), 1e5, np.float32))
    out.abort()


def test_an_unsupported_spec_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec = FEATURES["gelu"]
    with pytest.raises(UserError, match=r"block\.mlp\.activation"):
        writer(spec, planned(spec), None, tmp_path / "m.gguf", metadata={}, threads=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m.gguf"
    data = write(spec, random_weights(spec), path, 64)
    path.write_bytes({"truncated": data[:-5000], "garbage": b"GGUF" + data[::-1], "empty": b""}[damage])
    with pytest.raises(UserError):
        read_header(path)
    with pytest.raises(UserError, match="cannot load it"):
        load(path)


def test_beyond_the_context_is_refused(tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m.gguf"
    write(spec, random_weights(spec), path, 64)
    with load(path, context=16) as runtime:
        with pytest.raises(UserError, match="17 tokens exceed the session's context of 16"):
            runtime.logits(np.zeros((1, 17), int))
        with pytest.raises(UserError, match="outside the vocabulary"):
            runtime.prefill(np.array([spec.vocab_size]))
        runtime.prefill(np.zeros(10, int))
        with pytest.raises(UserError, match="17 tokens exceed"):
            runtime.step(np.zeros(7, int))
    with pytest.raises(UserError, match="must be between 1 and the model's 48"):
        load(path, context=49)


def grid(bits: int, rows: int = 6, cols: int = 96) -> QuantizedTensor:
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1)
    codes = rng.integers(-top, top, (rows, cols)).astype(np.int8)
    scales = (rng.integers(128, 256, (rows, cols // 32)) * 2.0**-14).astype(np.float32)
    return QuantizedTensor(codes, scales, bits)


@pytest.mark.parametrize(("bits", "name"), [(4, "q4_0"), (8, "q8_0"), (4, "q8_0")])
def test_codes_and_scales_survive_bit_for_bit(bits: int, name: str) -> None:
    """Against gguf's own decoder, and back through ours; 4-bit codes fit a Q8_0 that they share with 8-bit ones."""
    from gguf import GGMLQuantizationType, dequantize

    q = grid(bits)
    data = pack(q, name)
    np.testing.assert_array_equal(dequantize(data, GGMLQuantizationType[name.upper()]), q.dequantize())
    back = unpack(data, name)
    assert isinstance(back, QuantizedTensor)
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.scales, q.scales)


def test_bf16_rounds_to_nearest_even() -> None:
    x = np.array([1.0, 1.00390625, 1.01171875, -2.5e-39, 3.3e38, 0.1], np.float32)
    torch = pytest.importorskip("torch")
    want = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(x), want)


@pytest.mark.parametrize("name", [n for n, t in TYPES.items() if not t.importance])
def test_native_types_pack_to_their_size_with_any_number_of_threads(name: str) -> None:
    import gguf

    kind = TYPES[name]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.id)] == (kind.block, kind.size)
    assert BY_ID[kind.id] is kind
    x = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)
    one, many = pack(x, name, 1), pack(x, name, 4)
    np.testing.assert_array_equal(one, many)
    assert one.shape == (40, kind.nbytes(512))
    error = np.square(dense(unpack(one, name)) - x).mean()
    assert error < (0.7 if name.startswith(("tq", "iq1")) else 0.12)


def test_rows_shared_by_threads_equal_one_call() -> None:
    x = np.random.default_rng(1).standard_normal((100, 256)).astype(np.float32)
    rows = [quantize(x[i : i + 1], "q4_k") for i in range(100)]
    np.testing.assert_array_equal(quantize(x, "q4_k", 3), np.concatenate(rows))


def test_tensors_stored_as_one_take_a_type_that_holds_all() -> None:
    assert joined(["q4", "q4", "q4"]) == "q4_0"
    assert joined(["q4", "q8", "q4"]) == "q8_0"
    assert joined(["f16", "q8"]) == "f32"
    assert joined(["f16", "f16"]) == "f16"
