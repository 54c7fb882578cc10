"""llama.cpp's own types with importance, in one command: measured, written for llama.cpp, read again, verified."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.gguf.container import read_header
from convert import calibrated
from convert.calibrate import Settings
from convert.pipeline import Result, convert_all
from convert.sources import open_source
from convert.tests.conftest import weights, write_checkpoint
from convert.verify.gguf import Door
from convert.verify.packing import check_packing
from convert.verify.report import Check, Status
from spec import Spec, parse
from spec.errors import UserError

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred tokens are enough to move codes."""
    monkeypatch.setattr(calibrated, "Settings", partial(Settings, tokens=128))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Rows of whole 256-blocks, which llama.cpp's types of few bits want."""
    spec = _spec({"hidden": 256})
    return write_checkpoint(tmp_path / "wide", spec, weights(spec))


def _spec(mlp: dict[str, Any]) -> Spec:
    return parse({
        "name": "wide", "vocab_size": 96, "width": 256, "depth": 1, "context": 128,
        "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": mlp},
    })  # fmt: skip


def convert(checkpoint: Path, out: Path, level: str, **settings: Any) -> Result:
    given: dict[str, Any] = {"verify": False, "force": True, "threads": 1} | settings
    (result,) = convert_all(checkpoint, ["gguf"], level, out, **given)
    return result


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {n: (t.type, data[t.offset : t.offset + t.rows * t.row_bytes]) for n, t in read_header(path).tensors.items()}


def packing(artifact: Path, checkpoint: Path, level: str, imatrix: Path | None = None) -> Check:
    """The packing check of an artifact, as the verifying child makes it."""
    with open_source(checkpoint, (), None, imatrix) as source:
        shipped = Door().open_artifact(artifact, source.spec, level, 1)
        if source.importance is not None:
            shipped.artifact.importance = source.importance.means
        return check_packing(shipped.stored(), source)


def test_one_command_measures_rounds_and_verifies(wide: Path, tmp_path: Path) -> None:
    """And the file that it writes gives the same bytes to whoever reads it, this program among them."""
    file, out = tmp_path / "im.gguf", tmp_path / "m.gguf"
    made = convert(wide, out, "q2_k_s", calibrate="random", imatrix_out=file, verify=True)
    assert made.report is not None and made.report["packing"].status is Status.PASS
    assert "equal bit for bit" in made.report["packing"].reason and "hashes" not in made.report["packing"].reason
    assert made.receipt["rounding"]["tokens"] == 128 and made.receipt["weights_hash"] is None
    keys = read_header(out).keys
    assert (keys["quantize.imatrix.dataset"], keys["quantize.imatrix.entries_count"]) == ("random", 7)
    again = convert(wide, tmp_path / "again.gguf", "q2_k_s", imatrix=file)
    assert again.receipt["imatrix"]["entries"] == 7 and again.receipt["imatrix"]["file"] == "im.gguf"
    assert tensors(tmp_path / "again.gguf") == tensors(out)
    without = tensors(convert(wide, tmp_path / "plain.gguf", "q2_k").out)
    assert all(without[n][1] != data for n, (kind, data) in tensors(out).items() if "attn_q.weight" in n)


def test_later_the_file_or_the_hashes_stand_for_what_was_measured(wide: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "im.gguf", tmp_path / "m.gguf"
    convert(wide, out, "q4_k_m", calibrate="random", imatrix_out=file)
    assert "hashes" not in packing(out, wide, "q4_k_m", file).reason
    assert packing(out, wide, "q4_k_m", file).status is Status.PASS
    by_hash = packing(out, wide, "q4_k_m")
    assert by_hash.status is Status.PASS and "content hashes" in by_hash.reason
    data, at = bytearray(out.read_bytes()), read_header(out).tensors["blk.0.attn_q.weight"].offset
    data[at + 40] ^= 1
    out.write_bytes(data)
    for imatrix in (file, None):
        changed = packing(out, wide, "q4_k_m", imatrix)
        assert changed.status is Status.FAIL and "layers.0.attn.q.weight" in changed.reason


def test_a_dry_run_tells_of_types_that_need_importance(wide: Path, tmp_path: Path) -> None:
    (made,) = convert_all(wide, ["gguf"], "iq2_xxs", tmp_path / "m.gguf", calibrate="random", check=True, threads=1)
    assert made.levels["iq2_xxs"] == 6 and made.seconds > 0 and not made.out.exists()


def test_an_expert_that_no_token_chose_is_named(tmp_path: Path) -> None:
    mlp = {"kind": "moe", "experts": 3, "hidden": 256, "router": {"top_k": 1}}
    spec = _spec(mlp)
    tensor = weights(spec)
    router = tensor["layers.0.mlp.router.weight"]
    router[1], router[2] = 0, -router[0]  # never the second: of s and -s one is above 0
    checkpoint = write_checkpoint(tmp_path / "moe", spec, tensor)
    file = tmp_path / "im.gguf"
    made = convert(checkpoint, tmp_path / "m.gguf", "q4_k_m", calibrate="random", imatrix_out=file)
    assert any("without importance" in n and "experts" in n for n in made.notes), made.notes
    again = convert(checkpoint, tmp_path / "again.gguf", "q4_k_m", imatrix=file)
    (note,) = (n for n in again.notes if n.startswith("not in the importance file"))
    assert "layers.0.mlp.experts.gate.weight[1]" in note
    assert tensors(tmp_path / "again.gguf") == tensors(tmp_path / "m.gguf")


def test_what_a_file_lacks_is_refused_where_a_type_needs_it(wide: Path, tmp_path: Path) -> None:
    name, values = b"blk.0.attn_q.weight", np.ones(256, "<f4").tobytes()
    file = tmp_path / "few.dat"
    file.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, 256) + values)
    with pytest.raises(UserError, match=r"few.dat: has nothing of layers.0.attn.o.weight.* needs it .--calibrate"):
        convert(wide, tmp_path / "m.gguf", "iq2_xxs", imatrix=file)
    made = convert(wide, tmp_path / "m.gguf", "q4_k_m", imatrix=file)
    (note,) = (n for n in made.notes if n.startswith("not in the importance file"))
    assert "layers.0.mlp.down.weight" in note and "attn.q" not in note and "attn.v" not in note, (
        "q, k, v have one input"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "iq2_xxs needs importance: --calibrate stdlib measures it, --imatrix FILE brings it"),
        ({"imatrix": "missing.gguf"}, "--imatrix missing.gguf: no such file"),
        ({"imatrix": "x", "calibrate": "random"}, "--imatrix x: a text is read already"),
        ({"imatrix_out": "x.gguf"}, "--imatrix-out x.gguf: nothing is measured"),
        ({"imatrix_out": "x.dat", "calibrate": "random"}, "llama.cpp's format ends with .gguf (try x.gguf)"),
        ({"imatrix_out": "no/x.gguf", "calibrate": "random"}, "--imatrix-out no/x.gguf: no such folder"),
    ],
)
def test_refusals_name_the_option_and_the_fix(settings: dict[str, Any], words: str, wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        convert(wide, tmp_path / "m.gguf", "iq2_xxs", **settings)
    assert words in str(e.value)
    assert not list(tmp_path.glob("*.gguf"))
