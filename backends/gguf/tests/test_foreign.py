"""Files of other programs: heads that lie, metadata that is not read, rotations from divisors, every stored type."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.gguf import foreign
from backends.gguf.carriers import CARRIERS
from backends.gguf.container import read_header, read_split
from backends.gguf.foreign import layered, patch
from backends.gguf.foreign_rotary import from_divisors
from backends.gguf.keys import Keys, decimal
from backends.gguf.pack import dense, unpack
from backends.gguf.rotary import DEAD, divisors
from backends.gguf.types import TYPES
from spec import Spec
from spec.config import Rope, merge
from spec.errors import SpecError, UserError
from spec.rope import rope_table


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCH = key("general.architecture", 8, text("llama"))
INFO = text("token_embd.weight") + struct.pack("<I2QIQ", 2, 4, 3, 0, 0)


def head(keys: list[bytes], infos: list[bytes], count: int | None = None, version: int = 3) -> bytes:
    lead = struct.pack("<4sIQQ", b"GGUF", version, len(infos), len(keys) if count is None else count)
    return lead + b"".join(keys) + b"".join(infos)


def whole(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32) + bytes(48)


HUGE = 10**12
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "24 bytes are announced where 0 are left"),
    "another-format": (b"PK\x03\x04" + bytes(100), "it begins with"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "old": (head([ARCH], [], version=1), "version 1"),
    "no-architecture": (whole(head([], [INFO])), "without general.architecture"),
    "many-keys": (head([ARCH], [], count=HUGE), f"{HUGE} keys"),
    "many-tensors": (struct.pack("<4sIQQ", b"GGUF", 3, HUGE, 0), f"{HUGE} tensors"),
    "long-text": (head([struct.pack("<Q", HUGE) + bytes(30)], []), f"{HUGE} bytes are announced"),
    "long-value": (whole(head([key("a", 8, struct.pack("<Q", HUGE))], [])), f"{HUGE} bytes are announced"),
    "long-array": (whole(head([key("a", 9, struct.pack("<IQ", 6, HUGE))], [])), f"{HUGE} numbers"),
    "long-list": (whole(head([key("a", 9, struct.pack("<IQ", 8, HUGE))], [])), f"{HUGE} strings"),
    "nested": (head([key("a", 9, struct.pack("<IQ", 9, 1))], []), "array of arrays"),
    "odd-value": (head([key("a", 77, b"")], []), "a value of type 77"),
    "twice": (head([ARCH, ARCH], []), "is there twice"),
    "tensor-twice": (whole(head([ARCH], [INFO, INFO])), "is there twice"),
    "dimensions": (head([ARCH], [text("x") + struct.pack("<I", 9)]) + bytes(80), "9 dimensions"),
    "product": (whole(head([ARCH], [text("x") + struct.pack("<I2QIQ", 2, 1 << 40, 1 << 40, 0, 0)])), "of shape"),
    "no-block": (whole(head([ARCH], [text("x") + struct.pack("<I2QIQ", 2, 33, 1, 2, 0)])), "as q4_0"),
    "odd-type": (whole(head([ARCH], [text("x") + struct.pack("<I2QIQ", 2, 32, 1, 999, 0)])), "of type 999"),
    "alignment": (whole(head([ARCH, key("general.alignment", 4, struct.pack("<I", 33))], [INFO])), "alignment of 33"),
    "outside": (whole(head([ARCH], [text("x") + struct.pack("<I2QIQ", 2, 4, 3, 0, 1 << 60)])), "ends beyond"),
    "cut": (whole(head([ARCH], [INFO]))[:-20], "ends beyond"),
    "overlap": (whole(head([ARCH], [INFO, text("y") + struct.pack("<IQIQ", 1, 4, 0, 0)])), "inside the tensor before"),
    "not-text": (head([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(30)], []), "head is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_heads_that_lie_are_one_line_and_allocate_nothing(name: str, tmp_path: Path) -> None:
    import tracemalloc

    data, message = BROKEN[name]
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        read_header(tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert peak < 1_000_000


def test_a_sound_head_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole(head([ARCH], [INFO])))
    assert read_header(tmp_path / "m.gguf").tensors["token_embd.weight"].shape == (3, 4)


def split_key(name: str, value: int) -> bytes:
    return key(f"split.{name}", 2, struct.pack("<H", value))


def parts(folder: Path, counts: tuple[int, int] = (2, 2), second: bytes = INFO.replace(b"token", b"other")) -> Path:
    for n, (count, info) in enumerate(zip(counts, (INFO, second), strict=True)):
        keys = [split_key("no", n), split_key("count", count), *([ARCH] if n == 0 else [])]
        (folder / f"m-{n + 1:05d}-of-00002.gguf").write_bytes(whole(head(keys, [info])))
    return folder / "m-00002-of-00002.gguf"


def test_files_of_a_split_model_are_read_together(tmp_path: Path) -> None:
    found = read_split(parts(tmp_path))
    assert list(found.tensors) == ["token_embd.weight", "other_embd.weight"]
    assert found.tensors["other_embd.weight"].file.name == "m-00002-of-00002.gguf"
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(UserError, match="1 of 00002 files are missing: m-00001-of-00002"):
        read_split(tmp_path / "m-00002-of-00002.gguf")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of 3 files"):
        read_split(parts(tmp_path, (3, 2)))
    with pytest.raises(UserError, match="do not say that it is file 2 of 2"):
        read_split(parts(tmp_path, (2, 3)))
    with pytest.raises(UserError, match=r"token_embd\.weight is in another file too"):
        read_split(parts(tmp_path, second=INFO))


class Traits(ctypes.Structure):
    """ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@pytest.mark.parametrize("name", [n for n in TYPES if n != "f32"])
def test_every_type_is_decoded_as_ggml_does(name: str) -> None:
    """Bit for bit, on random bytes."""
    pytest.importorskip("llama_cpp")
    from backends.gguf.ggml import library

    lib, kind = library(), TYPES[name]
    lib.ggml_get_type_traits.restype, lib.ggml_get_type_traits.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    data = np.random.default_rng(kind.id).integers(0, 256, (16, kind.nbytes(1024)), dtype=np.uint8)
    want = np.empty((16, 1024), np.float32)
    to_float: Any = lib.ggml_get_type_traits(kind.id).contents.to_float
    for row, out in zip(data, want, strict=True):
        to_float(row.ctypes.data, out.ctypes.data, 1024)
    with np.errstate(all="ignore"):
        got = dense(unpack(data, name))
    number = ~np.isnan(want)
    assert number.mean() > 0.5 and np.array_equal(number, ~np.isnan(got))
    np.testing.assert_array_equal(got[number].view(np.uint32), want[number].view(np.uint32))


ROPE: dict[str, Any] = {"kind": "rope", "theta": 500000.0, "fraction": 1.0, "scaling": None}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
FORMULAS: dict[str, dict[str, Any]] = {
    "llama3.1": LLAMA3,
    "llama3.2": {**LLAMA3, "factor": 32.0},
    "short": {**LLAMA3, "factor": 4.0, "original_context": 512},
    "odd": {**LLAMA3, "high_freq_factor": 2.5, "original_context": 3000},
    "linear": {"kind": "linear", "factor": 3.0},
}


def found(f: np.ndarray[Any, Any], head_dim: int = 128, theta: float = 500000.0, attention: float = 1.0) -> Any:
    return from_divisors(f.astype(np.float64), theta, 2 * len(f), head_dim, 131072, attention)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_found_from_its_divisors_and_gives_them_again(name: str) -> None:
    position = {**ROPE, "scaling": FORMULAS[name]}
    table = rope_table(Rope.model_validate(position), 128, 131072)
    assert found(divisors(table, 500000.0, 128)) == position


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2", "short", "odd"])
def test_a_formula_is_found_in_float32_steps_too(name: str) -> None:
    """As llama.cpp's converter takes them, in torch."""
    torch = pytest.importorskip("torch")
    s = FORMULAS[name]
    out = []
    for freq in 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)):
        wave = 2 * np.pi / freq
        smooth = (s["original_context"] / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        between = 1 / ((1 - smooth) / s["factor"] + smooth)
        low, high = s["original_context"] / s["low_freq_factor"], s["original_context"] / s["high_freq_factor"]
        out.append(1 if wave < high else s["factor"] if wave > low else between)
    f = torch.tensor(out, dtype=torch.float32).numpy()
    assert found(f) == {**ROPE, "scaling": s}
    other = f.copy()
    other[np.argmax((f > 1.1) & (f < 7))] *= np.float32(1 + 1e-5)
    assert found(other)["scaling"]["kind"] == "longrope"  # near is not enough


def test_divisors_of_no_formula_stay_what_they_are() -> None:
    f = np.linspace(1, 5, 64).astype(np.float32)
    position = found(f, attention=1.25)
    assert position["scaling"]["attention_factor"] == 1.25
    table = rope_table(Rope.model_validate(position), 128, 131072)
    np.testing.assert_allclose(divisors(table, 500000.0, 128), f, rtol=2.0**-22)  # frequencies are float32


@pytest.mark.parametrize(("alive", "scaling"), [(32, None), (16, {"kind": "linear", "factor": 2.0})])
def test_pairs_that_stand_still_are_a_partial_rotation(alive: int, scaling: Any) -> None:
    position = {**ROPE, "fraction": alive / 64, "scaling": scaling}
    table = rope_table(Rope.model_validate(position), 128, 131072)
    assert found(divisors(table, 500000.0, 128)) == position
    assert found(np.full(64, DEAD, np.float32)) == {"kind": "none"}


def test_numbers_are_what_their_writer_meant() -> None:
    assert decimal(float(np.float32(1e-6))) == 1e-6
    assert decimal(0.1) == 0.1
    assert decimal(500000.0) == 500000.0


def test_every_key_is_read_known_or_an_error() -> None:
    data = {
        "general.name": "x", "tokenizer.ggml.model": "none", "mradermacher.quantized_by": "y", "llama.block_count": 2,
        "llama.new_trick": 3, "llama.expert_count": 8, "llama.attention.causal": True, "xielu.eps": [1.0],
    }  # fmt: skip
    k = Keys(data, "llama", "m.gguf")
    assert k.whole("block_count") == 2
    with pytest.raises(SpecError) as error:
        k.done()
    assert [p.path for p in error.value.problems] == ["llama.new_trick", "llama.expert_count", "xielu.eps"]


WRONG: dict[str, Any] = {"block_count": -1, "x": float("nan"), "scaling": 3, "flag": "yes", "heads": [1, 2]}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_another_kind_are_errors(name: str) -> None:
    k = Keys({f"llama.{name}": WRONG[name]}, "llama", "m.gguf")
    reading = {"block_count": k.whole, "x": k.number, "scaling": k.text, "flag": k.flag}
    assert (k.layers(name, 3, int) if name == "heads" else reading[name](name)) is None
    with pytest.raises(SpecError, match=rf"llama\.{name}"):
        k.check()


@pytest.mark.parametrize(("arch", "key", "fine", "other"), [
    ("ernie4_5-moe", "interleave_moe_layer_step", 1, 2),
    ("cohere2moe", "attention.layer_norm_rms_epsilon", 0.0, 1e-5),
    ("cohere2moe", "leading_dense_block_count", 0, 1),
])  # fmt: skip
def test_keys_that_one_architecture_alone_reads_are_refused_there(arch: str, key: str, fine: Any, other: Any) -> None:
    """A step between mixtures; an epsilon that makes every norm another one; rotation of the first layers."""
    (fixed,) = (dict(c.keys) for c in CARRIERS if c.arch == arch)
    Keys({f"{arch}.{key}": fine}, arch, "m.gguf", fixed).done()
    with pytest.raises(SpecError, match=rf"{arch}\.{key}: {other:g}.* changes the function and is not supported"):
        Keys({f"{arch}.{key}": other}, arch, "m.gguf", fixed).done()


LAYERS = {
    "all-alike": [0, 0, 0, 0],
    "alternating": [1, 0, 1, 0],
    "one-in-three": [1, 1, 0, 1, 1, 0, 1],
    "first": [1, 0, 0, 0, 0],
    "two-runs": [0, 1, 1, 0, 2],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_become_a_pattern_or_runs(name: str) -> None:
    kinds = [
        {"window": None, "position": ROPE},
        {"window": 7, "position": {"kind": "none"}},
        {"window": None, "position": {**ROPE, "scaling": LLAMA3}},
    ]  # fmt: skip
    blocks: list[dict[str, Any]] = [
        {"attention": {"heads": 2, "kv_heads": 2, **kinds[n]}, "mlp": {"hidden": 8}} for n in LAYERS[name]
    ]
    spec = Spec.model_validate(
        {"vocab_size": 8, "width": 8, "depth": len(blocks), "context": 64, **layered(blocks)}
    )  # fmt: skip
    for want, layer in zip(blocks, spec.layers, strict=True):
        assert layer.attention.window == want["attention"]["window"]
        assert layer.attention.position.model_dump() == want["attention"]["position"]
    assert merge(blocks[0], patch(blocks[0], blocks[1])) == blocks[1]


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole(head([ARCH.replace(b"llama", b"lamma")], [INFO])))
    with pytest.raises(UserError, match=r"'lamma' is none that is read \(did you mean llama\?; known: .*gemma2"):
        foreign.read_foreign(read_header(tmp_path / "m.gguf"), tmp_path / "m.gguf")
