"""pytorch_model.bin: the same values as safetensors, nothing run, and no more memory than a few row blocks."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.sources import open_source, torchbin
from convert.tests.conftest import weights
from spec import UserError

torch = pytest.importorskip("torch")
Writes = Callable[..., Path]


def as_bin(folder: Path, dtype: Any = None, **extra: Any) -> dict[str, Any]:
    """Turn a folder's safetensors into pytorch_model.bin files of the same shards."""
    index = folder / "model.safetensors.index.json"
    whole: dict[str, Any] = {}
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state = {n: torch.from_numpy(w) if dtype is None else torch.from_numpy(w).to(dtype)
                 for n, w in load_file(file).items()} | extra  # fmt: skip
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(state, folder / name)
        where |= dict.fromkeys(state, name)
        whole |= state
        file.unlink()
    if index.exists():
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        index.unlink()
    return whole


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_values_as_safetensors(huggingface: Writes, shards: int) -> None:
    folder = huggingface(shards)
    as_bin(folder)
    with open_source(folder) as source:
        for name, w in weights(source.spec).items():
            np.testing.assert_array_equal(source.tensor(name), w)


def test_sixteen_bits_and_shared_storages(huggingface: Writes) -> None:
    folder = huggingface(tie_word_embeddings=True)
    state = as_bin(folder, torch.bfloat16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    both = torch.cat([state["model.norm.weight"], torch.zeros(7, dtype=torch.bfloat16)])
    state["model.norm.weight"] = both[:64]  # a piece of a larger storage
    torch.save(state, folder / "pytorch_model.bin")
    with open_source(folder) as source:
        assert source.dtypes() == {"bf16": len(source.names())}
        for name, outside in (
            ("embed.weight", "model.embed_tokens.weight"),
            ("final_norm.weight", "model.norm.weight"),
        ):
            np.testing.assert_array_equal(source.tensor(name), state[outside].float().numpy())


def test_safetensors_beside_it_wins_and_says_so(huggingface: Writes) -> None:
    folder = huggingface()
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    with open_source(folder) as source:
        assert any("pytorch_model.bin beside it: not looked at" in note for note in source.notes)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("key", ["model.norm.weight", "extra"])
def test_a_payload_is_refused_and_not_run(huggingface: Writes, tmp_path: Path, key: str) -> None:
    folder, marker = huggingface(), tmp_path / "ran"
    state = as_bin(folder)
    torch.save({**state, key: Evil(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"refused: its pickle asks for (posix|nt)\.system.*nothing of it was run") as e:
        open_source(folder)
    assert not marker.exists() and "\n" not in str(e.value)
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the payload is a real one
    assert marker.exists()


def test_a_bare_pickle_is_refused_and_not_run(huggingface: Writes, tmp_path: Path) -> None:
    folder, marker = huggingface(), tmp_path / "ran"
    as_bin(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker), 2))
    with pytest.raises(UserError, match=r"format from before 1\.6"):
        open_source(folder)
    assert not marker.exists()


def rezipped(path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members:
            archive.writestr(name, change(name, data))


def test_damage_is_one_line(huggingface: Writes) -> None:
    folder = huggingface()
    state = as_bin(folder)
    file = folder / "pytorch_model.bin"
    good = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as e:
            open_source(folder)
        assert "\n" not in str(e.value) and "pytorch_model.bin" in str(e.value)

    for keep in (0.2, 0.6, 0.999):
        file.write_bytes(good[: int(len(good) * keep)])
        refused("copy it again")
    file.write_bytes(b"\0" * 4000)
    refused("no file of torch.save")
    file.write_bytes(good)
    rezipped(file, lambda n, d: d, zipfile.ZIP_DEFLATED)
    refused("is compressed")
    file.write_bytes(good)
    rezipped(file, lambda n, d: d[:-4] if n.endswith("/data/0") else d)
    refused("does not lie where|cannot read it")
    file.write_bytes(good)
    rezipped(file, lambda n, d: b"big" if n.endswith("byteorder") else d)
    refused("big-endian")
    file.write_bytes(good)
    rezipped(file, lambda n, d: d[:100] if n.endswith("data.pkl") else d)
    refused("cannot read it")
    torch.save(state, file, _use_new_zipfile_serialization=False)
    refused("before 1.6")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s | {"epoch": 3, "optimizer": {"a": 1}}, r"2 of its entries are no tensors: 'epoch', 'optimizer'"),
        (lambda s: [1, 2], "holds list, not tensors by name"),
        (lambda s: s | {"model.norm.weight": torch.zeros(64, 64).t()}, "view with strides"),
        (lambda s: s | {"model.norm.weight": torch.ones(1).expand(64)}, "view with strides"),
        (lambda s: s | {"model.norm.weight": torch.zeros(64).to_sparse()}, "sparse|cannot read"),
        (lambda s: s | {"model.norm.weight": torch.zeros(64, dtype=torch.float64)}, "1 tensor is F64"),
        (lambda s: s | {"model.norm.weight": torch.zeros(64, dtype=torch.complex64)}, "complex64"),
        (lambda s: {k: v for k, v in s.items() if "norm" not in k}, "tensors are missing"),
    ],
)
def test_what_is_no_state_dict_is_named(huggingface: Writes, change: Callable[[Any], Any], says: str) -> None:
    folder = huggingface()
    torch.save(change(as_bin(folder)), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=says):
        open_source(folder)


def test_a_missing_torch_is_one_line(huggingface: Writes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = huggingface()
    as_bin(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"read with torch: pip install 'allotrope\[train\]'"):
        open_source(folder)


def test_an_old_torch_is_refused_before_it_reads(huggingface: Writes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = huggingface()
    as_bin(folder)
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(UserError, match=r"torch 2\.13 or later, here is 2\.5\.1"):
        open_source(folder)
    assert torchbin.NEEDS == (2, 13)


def test_memory_is_a_few_row_blocks(tmp_path: Path) -> None:
    """300 MB of weights, read whole: what the process holds beyond torch itself stays far below them."""
    script = """
import sys, torch
from convert.sources import torchbin
from convert.sources.safetensors import Tensors
from pathlib import Path

def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024

folder = Path(sys.argv[1])
before = peak()
tensors = Tensors(folder, torchbin.WEIGHTS, torchbin.read)
total = 0.0
for name, e in tensors.entries.items():
    for start in range(0, e.rows, 1024):
        total += float(tensors.fetch(name, start, min(e.rows, start + 1024)).sum())
print(peak() - before, total)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    torch.save({f"w{i}": torch.full((25 * 1024, 1024), i + 1.0) for i in range(3)}, tmp_path / "pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, total = done.stdout.split()
    assert float(total) == 6 * 25 * 1024 * 1024
    assert int(grown) < 40_000_000
