"""The interpreter's other parts: the weight file, states and what may be updated in place, roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from backends.coreml.library import coremltools
from backends.coreml.mil.machine import Machine
from backends.coreml.mil.program import Function, Instruction, Output, Ref
from backends.coreml.mil.weights import Blob
from spec.errors import UserError

RNG = np.random.default_rng(0)


def written(path: Path, dtype: str, values: Any) -> Blob:
    """A tensor written by coremltools' own writer, after another one, so that offsets matter."""
    coremltools()
    from coremltools.libmilstoragepython import _BlobStorageWriter

    writer = _BlobStorageWriter(str(path))
    writer.write_float_data(np.arange(5, dtype=np.float32))
    flat = values.reshape(-1)
    if dtype == "FLOAT16":
        offset = writer.write_fp16_data(flat.view(np.uint16))
    else:
        name = {"FLOAT32": "float"}.get(dtype, dtype.lower())
        offset = getattr(writer, f"write_{name}_data")(flat)
    del writer  # writes what it holds
    return Blob(path, offset, dtype, values.shape)


KINDS = {
    "FLOAT32": RNG.standard_normal((6, 7)).astype(np.float32),
    "FLOAT16": RNG.standard_normal((6, 7)).astype(np.float16),
    "INT32": RNG.integers(-9, 9, (6, 7)).astype(np.int32),
    "INT8": RNG.integers(-128, 128, (6, 7)).astype(np.int8),
    "UINT8": RNG.integers(0, 256, (6, 7)).astype(np.uint8),
    "INT4": RNG.integers(-8, 8, (6, 7)).astype(np.int8),
    **{f"UINT{n}": RNG.integers(0, 1 << n, (6, 7)).astype(np.uint8) for n in (1, 2, 3, 4, 6)},
}


@pytest.mark.parametrize("dtype", KINDS)
def test_rows_come_back_as_coremltools_wrote_them(dtype: str, tmp_path: Path) -> None:
    """Seven columns: rows of less than a byte an element begin inside bytes."""
    values = KINDS[dtype]
    blob = written(tmp_path / "weight.bin", dtype, values)
    assert np.array_equal(blob.read(), values) and blob.read().dtype == values.dtype
    for first in range(6):
        for last in range(first + 1, 7):
            assert np.array_equal(blob.rows(first, last), values[first:last])


def test_a_damaged_weight_file_is_a_user_error(tmp_path: Path) -> None:
    blob = written(tmp_path / "weight.bin", "INT8", KINDS["INT8"])
    whole = blob.file.read_bytes()
    blob.file.write_bytes(whole[: blob.offset + 70])
    with pytest.raises(UserError, match="ends before"):
        Blob(blob.file, blob.offset, "INT8", (6, 7)).read()
    blob.file.write_bytes(whole[: blob.offset + 10])
    with pytest.raises(UserError, match="ends before"):
        Blob(blob.file, blob.offset, "INT8", (6, 7)).read()
    blob.file.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="no INT8 tensor"):
        Blob(blob.file, blob.offset, "INT8", (6, 7)).read()
    blob.file.unlink()
    with pytest.raises(UserError, match="No such file"):
        Blob(blob.file, blob.offset, "INT8", (6, 7)).read()


STATE = Output("s", "FLOAT16", (4,))
X = Output("x", "FLOAT16", (2,))


def function(*body: Instruction, outputs: tuple[str, ...]) -> Function:
    return Function("main", (X,), (STATE,), body, outputs)


def read(name: str) -> Instruction:
    return Instruction("read_state", {"input": Ref("s")}, (Output(name, "FLOAT16", (4,)),))


def update(source: str, name: str) -> Instruction:
    args = {"x": Ref(source), "update": Ref("x"), "begin": np.array([1]), "end": np.array([3])}
    return Instruction("slice_update", args, (Output(name, "FLOAT16", (4,)),))


def write(name: str) -> Instruction:
    return Instruction("write_state", {"input": Ref("s"), "data": Ref(name)}, ())


def add(a: str, b: str, name: str, size: int = 4, dtype: str = "FLOAT16") -> Instruction:
    return Instruction("add", {"x": Ref(a), "y": Ref(b)}, (Output(name, dtype, (size,)),))


def run(f: Function, state: Any, x: Any, precision: str = "f16") -> tuple[dict[str, Any], Any, int]:
    machine = Machine({"main": f}, precision)
    states = machine.new_states("main")
    states["s"][:] = state
    before = states["s"]
    out = machine.run("main", {"x": np.asarray(x, np.float32)}, states)
    return out, states["s"], int(states["s"] is before)


def test_an_update_that_nothing_else_sees_is_in_place() -> None:
    f = function(read("a"), update("a", "b"), write("b"), read("c"), add("c", "c", "y"), outputs=("y",))
    out, state, same = run(f, [1, 2, 3, 4], [7, 8])
    assert same and state.tolist() == [1, 7, 8, 4] and out["y"].tolist() == [2, 14, 16, 8]


def test_a_read_that_is_used_later_keeps_its_values() -> None:
    f = function(read("a"), update("a", "b"), write("b"), read("c"), add("a", "c", "y"), outputs=("y",))
    out, state, same = run(f, [1, 2, 3, 4], [7, 8])
    assert not same and state.tolist() == [1, 7, 8, 4] and out["y"].tolist() == [2, 9, 11, 8]


def test_an_update_that_is_not_written_back_leaves_the_state() -> None:
    f = function(read("a"), update("a", "b"), add("b", "b", "y"), outputs=("y",))
    out, state, _ = run(f, [1, 2, 3, 4], [7, 8])
    assert state.tolist() == [1, 2, 3, 4] and out["y"].tolist() == [2, 14, 16, 8]


def test_a_view_of_a_state_does_not_see_later_updates() -> None:
    sliced = Instruction("slice_by_index", {"x": Ref("a"), "begin": np.array([0]), "end": np.array([4])},
                         (Output("v", "FLOAT16", (4,)),))  # fmt: skip
    f = function(read("a"), sliced, read("b"), update("b", "c"), write("c"), add("v", "v", "y"), outputs=("y",))
    out, state, same = run(f, [1, 2, 3, 4], [7, 8])
    assert same and state.tolist() == [1, 7, 8, 4] and out["y"].tolist() == [2, 4, 6, 8]


def test_written_values_do_not_change_with_a_later_update() -> None:
    f = function(add("s0", "s0", "w"), write("w"), read("a"), update("a", "b"), write("b"), add("w", "w", "y"),
                 outputs=("y",))  # fmt: skip
    first = read("s0")
    f = Function(f.name, f.inputs, f.states, (first, *f.body), f.outputs)
    out, state, _ = run(f, [1, 2, 3, 4], [7, 8])
    assert state.tolist() == [2, 7, 8, 8] and out["y"].tolist() == [4, 8, 12, 16]


def test_half_results_are_rounded_after_every_operation_and_others_are_not() -> None:
    f = function(add("x", "x", "a", 2), add("a", "x", "y", 2), outputs=("y",))
    x = np.array([1 + 2**-10, 1 / 3], np.float32)
    rounded = (x + x).astype(np.float16).astype(np.float32)
    assert np.array_equal(run(f, 0, x)[0]["y"], (rounded + x).astype(np.float16).astype(np.float32))
    assert np.array_equal(run(f, 0, x, "f32")[0]["y"], x + x + x)
    assert run(f, 0, x, "f64")[0]["y"].dtype == np.float64


def test_an_unknown_operation_is_refused_before_anything_runs() -> None:
    f = function(Instruction("conv", {"x": Ref("x")}, (Output("y", "FLOAT16", (2,)),)), outputs=("y",))
    with pytest.raises(UserError, match="conv"):
        Machine({"main": f})


def test_types_that_mil_does_not_mix_are_refused_before_anything_runs() -> None:
    cast = Instruction("cast", {"x": Ref("x"), "dtype": "fp32"}, (Output("wide", "FLOAT32", (2,)),))
    with pytest.raises(UserError, match="main, y: add of FLOAT32 and FLOAT16, which MIL does not mix"):
        Machine({"main": function(cast, add("wide", "x", "y", 2), outputs=("y",))})
    with pytest.raises(UserError, match="main, y: add gives FLOAT16, and FLOAT32 is declared"):
        Machine({"main": function(add("x", "x", "y", 2, "FLOAT32"), outputs=("y",))})
    less = Instruction("less", {"x": Ref("x"), "y": Ref("x")}, (Output("y", "FLOAT16", (2,)),))
    with pytest.raises(UserError, match="less gives BOOL"):
        Machine({"main": function(less, outputs=("y",))})
    narrow = Instruction("cast", {"x": Ref("x"), "dtype": "int8"}, (Output("y", "INT16", (2,)),))
    with pytest.raises(UserError, match="cast gives INT8, and INT16 is declared"):
        Machine({"main": function(narrow, outputs=("y",))})
    half = Instruction("const", {"val": np.zeros(2, np.float16)}, (Output("c", "FLOAT16", (2,)),))
    both = Instruction(
        "concat", {"values": [Ref("c"), Ref("wide")], "axis": np.int32(0)}, (Output("y", "FLOAT16", (4,)),)
    )
    with pytest.raises(UserError, match="concat of FLOAT16 and FLOAT32"):
        Machine({"main": function(half, cast, both, outputs=("y",))})


def test_a_shape_other_than_the_declared_is_refused() -> None:
    with pytest.raises(UserError, match=r"y: has the shape \[2\], and \[9\] is declared"):
        run(function(add("x", "x", "y", 9), outputs=("y",)), 0, [1, 2])
    with pytest.raises(UserError, match=r"x: has the shape \[3\], and \[2\] is declared"):
        run(function(add("x", "x", "y", 2), outputs=("y",)), 0, [1, 2, 3])
