"""Folders that mean harm: each is one line and status 2, nothing of it is run, and no memory goes to it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from convert.sources import open_source
from convert.tests.conftest import LLAMA, weights, write_checkpoint, write_huggingface
from spec import Spec, UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, pipes and resource limits")
MEMORY = 3_000_000_000
"""Bytes of address space that the child may have: Python with its libraries takes about one."""
Attack = Callable[[Path], object]


def config(**changes: Any) -> Attack:
    return lambda f: raw("config.json", json.dumps({**LLAMA, **changes}).encode())(f)


def raw(name: str, content: bytes) -> Attack:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return write


def huge(name: str) -> Attack:
    """A gigabyte that takes no disk."""

    def write(folder: Path) -> None:
        with (folder / name).open("wb") as f:
            f.truncate(1_000_000_000)

    return write


def instead(name: str, make: Callable[[Path], object]) -> Attack:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def link(name: str, target: str) -> Attack:
    return instead(name, lambda p: p.symlink_to(target))


def index(*files: str) -> Attack:
    def write(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        where = {n: files[i % len(files)] for i, n in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    return write


def header(change: Callable[[dict[str, Any]], None]) -> Attack:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (n,) = struct.unpack("<Q", content[:8])
        data = json.loads(content[8 : 8 + n])
        change(data)
        text = json.dumps(data).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + n :])

    return write


def shape(*axes: Any) -> Attack:
    return header(lambda h: h["model.norm.weight"].update(shape=list(axes)))


def beside(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


LAUGHS = b"a: &a [x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(20)
)
FOLDERS: dict[str, tuple[Attack, str]] = {
    "index-up": (index("../../etc/passwd"), "lies outside the folder"),
    "index-absolute": (index("/etc/passwd"), "lies outside the folder"),
    "index-inside-and-up": (index("a/../b.safetensors"), "lies outside the folder"),
    "index-dots": (index(".."), "lies outside the folder"),
    "index-nul": (index("a\0b"), "lies outside the folder"),
    "index-missing": (index("a.safetensors"), "1 of 1 shards are missing"),
    "index-nested": (raw("config.json", b"[" * 1_000_000), "not valid JSON"),
    "link-weights": (link("model.safetensors", "/etc/hostname"), "outside the folder"),
    "link-config": (link("config.json", "../../secret.json"), "outside the folder"),
    "link-zero": (link("config.json", "/dev/zero"), "a device, where a file is expected"),
    "link-tokenizer": (link("tokenizer.json", "/etc/hostname"), "outside the folder"),
    "link-nowhere": (link("config.json", "nowhere"), "a link to nothing"),
    "link-itself": (link("config.json", "config.json"), "config.json"),
    "header-length": (raw("model.safetensors", struct.pack("<Q", 10**12) + b"{}"), "for a header of 1000000000000"),
    "header-lists": (raw("model.safetensors", beside(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")), "no sound dtype"),
    "header-deep": (raw("model.safetensors", beside(b'{"a":' * 1_000_000)), "corrupt header"),
    "header-twice": (raw("model.safetensors", beside(b'{"a":{},"a":{}}')), "appears twice"),
    "header-product": (shape(2**62, 2**62), "needs .* bytes"),
    "header-negative": (shape(-1, -64), "no sound"),
    "header-axes": (shape(*[1] * 100_000), "no sound"),
    "header-float": (shape(64.0), "no sound"),
    "header-name": (header(lambda h: h.update({"\x1b[2J\nok": h.pop("model.norm.weight")})), "is no name of a tensor"),
    "header-key": (header(lambda h: h["model.norm.weight"].update(dtype="F" * 10_000_000)), "has dtype"),
    "config-huge": (huge("config.json"), "more than such a file ever has"),
    "index-huge": (lambda f: (huge("model.safetensors.index.json")(f), (f / "model.safetensors").unlink()), "more th"),
    "tokenizer-huge": (huge("tokenizer.json"), "more than such a file ever has"),
    "pieces-huge": (huge("tokenizer.model"), "tokenizer.model"),
    "vocabulary-huge": (huge("vocab.json"), "vocab.json"),
    "template-huge": (lambda f: (raw("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}')(f),
                                 huge("chat_template.jinja")(f)), "chat_template.jinja|tokenizer.json"),
    "adapter-as-model": (lambda f: ((f / "config.json").unlink(), raw("adapter_config.json", b"{}")(f)), "is no model"),
    "config-nan": (raw("config.json", json.dumps({**LLAMA, "rms_norm_eps": float("nan")}).encode()), "NaN is no JSON"),
    "config-infinite": (raw("config.json", json.dumps({**LLAMA, "x": float("inf")}).encode()), "Infinity is no JSON"),
    "config-overflow": (raw("config.json", b'{"rms_norm_eps": 1e999}'), "'1e999' is no number"),
    "config-digits": (raw("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "config-many-digits": (config(vocab_size=int("9" * 4000)), "9999.* is no number that a float holds"),
    "config-twice": (raw("config.json", b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "config-binary": (raw("config.json", b"\xff\xfe\x00"), "not valid JSON"),
    "config-list": (raw("config.json", b"[1]"), "not a JSON object"),
    "config-layers": (config(num_hidden_layers=10**12), "depth|num_hidden_layers"),
    "config-width": (config(hidden_size=2**62, num_attention_heads=2**31), "config.json"),
    "config-vocabulary": (config(vocab_size=10**15), "config.json|shape"),
    "config-code": (config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "config-escape": (config(**{"\x1b[2J\x07": 1}), "is an unknown key"),
    "config-unknown": (config(model_type="evil", auto_map={"AutoConfig": "evil.Config"}), "model_type"),
    "config-method": (config(quantization_config={"quant_method": "gptq"}), "'gptq' is not read"),
    "config-regex": (config(quantization_config={"quant_method": "compressed-tensors", "ignore": ["re:(a+)+$"],
                                                 "format": "x"}), "format: 'x'"),
    **{f"folder-{n}": (instead(n, Path.mkdir), "a folder, where a file is expected")
       for n in ("config.json", "model.safetensors", "tokenizer.json")},
    **{f"pipe-{n}": (instead(n, os.mkfifo), "a pipe, where a file is expected")
       for n in ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
                 "tokenizer_config.json", "generation_config.json", "spec.yaml")
       if n != "model.safetensors.index.json"},
    "spec-laughs": (raw("spec.yaml", LAUGHS), "aliases of aliases"),
    "spec-huge": (huge("spec.yaml"), "more than such a file ever has|not UTF-8|spec.yaml"),
    "spec-python": (raw("spec.yaml", b"!!python/object/apply:os.system ['touch ran']"), "not valid YAML"),
    "spec-itself": (raw("spec.yaml", b"&a a: *a"), "spec.yaml"),
    "spec-deep": (raw("spec.yaml", b"[" * 50_000), "nested too deeply"),
    "spec-digits": (raw("spec.yaml", b"depth: 0x" + b"f" * 100_000), "too many digits"),
}  # fmt: skip

CHILD = """
import contextlib, io, json, resource, sys, time
from pathlib import Path
from convert.cli import main
from convert import pipeline, push, hub  # everything that a conversion imports, before the limit
import backends.gguf.build, tokenizers, huggingface_hub
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    said, status, began = io.StringIO(), None, time.monotonic()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(folder), "--check"])
        except SystemExit as e:
            status = e.code
        except BaseException as e:
            status = repr(e)[:300]
    print(json.dumps([folder.name, status, said.getvalue(), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str, float]]:
    """What the command says to each folder, all in one child whose memory is bounded."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "secret.json").write_text("{}")
    for name, (attack, _) in FOLDERS.items():
        write_huggingface(root / "folders" / name, LLAMA)
        attack(root / "folders" / name)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root / "folders"), str(MEMORY)],
        capture_output=True, text=True, timeout=240, cwd=root, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert not (root / "ran").exists()
    found = {name: (status, said, took) for name, status, said, took in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(FOLDERS), done.stderr[-2000:]
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_one_line(outcomes: dict[str, tuple[Any, str, float]], name: str) -> None:
    import re

    status, said, took = outcomes[name]
    assert status == 2, (status, said)
    lines = said.splitlines()
    assert 0 < len(lines) < 8 and all(line.startswith("convert: ") for line in lines), said[:2000]
    assert all(len(line) < 1500 and line.isprintable() for line in lines)
    assert re.search(FOLDERS[name][1], lines[0]), lines[0]
    assert took < 20


def test_the_hubs_own_links_are_followed(tmp_path: Path) -> None:
    """A snapshot of the Hub's cache holds links to blobs of the same repository, and of no other."""
    repo = tmp_path / "models--owner--some-name"
    snapshot = repo / "snapshots" / ("0" * 40)
    write_huggingface(snapshot, LLAMA)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"{i:064}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    with open_source(snapshot) as source:
        assert source.name == "some-name"
        assert source.origin == {"repo": "owner/some-name", "revision": "0" * 40}
    (tmp_path / "models--other--one" / "blobs").mkdir(parents=True)
    stranger = tmp_path / "models--other--one" / "blobs" / "1"
    stranger.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(stranger)
    with pytest.raises(UserError, match="outside the folder"):
        open_source(snapshot)


def test_a_card_that_means_harm_is_left_out(tmp_path: Path, small: Spec) -> None:
    from convert.provenance import provenance

    folder = write_checkpoint(tmp_path / "c", small, weights(small))
    secret = tmp_path / "secret"
    secret.write_text("password")
    for attack in (
        huge("README.md"), raw("README.md", b"---\n" + LAUGHS + b"\n---\n"), link("README.md", "../secret"),
        instead("README.md", os.mkfifo), raw("README.md", b"---\n[" + b"[" * 100_000 + b"\n---\n"),
    ):  # fmt: skip
        (folder / "README.md").unlink(missing_ok=True)
        attack(folder)
        (folder / "LICENSE").unlink(missing_ok=True)
        (folder / "LICENSE").symlink_to(secret)
        with open_source(folder) as source:
            known = provenance(source)
        assert known.front == {} and known.licences == ()
        assert any("card is not carried over" in note for note in known.notes)


def test_values_that_front_matter_never_has_are_left_out(tmp_path: Path, small: Spec) -> None:
    from convert.provenance import provenance

    folder = write_checkpoint(tmp_path / "c", small, weights(small))
    (folder / "README.md").write_text('---\nlicense: {a: 1}\nlanguage: [en, 3]\ndatasets: ["x\\ny"]\n---\n')
    with open_source(folder) as source:
        assert provenance(source).front == {}


def test_a_mixed_folder_of_dtypes_is_read(tmp_path: Path, small: Spec) -> None:
    import numpy as np

    w = weights(small)
    mixed = {n: v.astype(np.float16) if i % 2 else v for i, (n, v) in enumerate(w.items())}
    folder = write_checkpoint(tmp_path / "c", small, {})
    save_file(mixed, folder / "model.safetensors")
    with open_source(folder) as source:
        assert set(source.dtypes()) == {"f16", "f32"}
        for n, v in mixed.items():
            np.testing.assert_array_equal(source.tensor(n), v.astype(np.float32))
