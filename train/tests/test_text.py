"""Sources, the documents in them, and the tokenizer."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.errors import UserError
from train.config.sources import Source
from train.data import corpus, pieces, rows, tokenizer
from train.data.corpus import Corpus
from train.data.tokenizer import END, TextTokenizer
from train.tests.conftest import write_text


def read(path: Path | str, validation: float = 0.1, **columns: Any) -> Corpus:
    return corpus.read(Source(source=str(path), **columns), validation)


def texts(path: Path | str, **columns: Any) -> list[Any]:
    return [d.content for d in read(path, **columns).documents()]


def plain(found: Corpus, held_out: bool | None = None) -> list[str]:
    return [d.content for d in found.documents(held_out) if isinstance(d.content, str)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return tokenizer.train(plain(read(write_text(tmp_path_factory.mktemp("text"))), False), 400, 32)


def test_the_standard_library_is_there_without_tests_and_held_out_by_file() -> None:
    found = read("stdlib", 0.05)
    assert found.size > 4e6
    names = {p.name for p in found.parts}
    assert {"typing.py", "json/decoder.py"} <= names
    assert not any(part in ("test", "tests", "idlelib", "site-packages") for n in names for part in n.split("/"))
    held, rest = (list(found.documents(which)) for which in (True, False))
    assert not {d.part.name for d in held} & {d.part.name for d in rest}
    assert 0.005 < sum(d.bytes for d in held) / found.size < 0.2
    assert read("stdlib", 0.05) == found
    root = Path(sysconfig.get_path("stdlib"))
    assert sum(d.bytes for d in (*held, *rest) if d.part.name == "typing.py") == (root / "typing.py").stat().st_size


@pytest.mark.parametrize("line", ["wörter und λ\n", "ohne Zeilenende λ", "x", "λ", "\n"])
def test_a_large_file_is_cut_without_loss(line: str, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    text = line * 60_000
    path.write_text(text, encoding="utf-8")
    found = read(path)
    documents = plain(found)
    assert len(documents) >= 10
    assert plain(found, True)
    assert "".join(documents) == text
    if "\n" in line:
        assert all(d.endswith("\n") for d in documents)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(text.encode()))
    path.unlink()
    assert "".join(texts(tmp_path / "large.txt.gz")) == text


@given(text=st.text(st.sampled_from("aλ €😀\n"), min_size=1, max_size=9000), piece=st.integers(16, 200))
def test_parts_of_a_text_are_read_by_themselves_and_join_to_it(text: str, piece: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    data = text.encode()
    path.write_bytes(data)
    parts = list(pieces.parts(path, "any", "0", len(data), piece, by_file=False))
    read = {n: "".join(str(d.content) for d in pieces.read(p)) for n, p in reversed(list(enumerate(parts)))}
    assert "".join(read[n] for n in range(len(parts))) == text
    keys = [key for p in parts for key in pieces.keys(p)]
    assert [d.key for p in parts for d in pieces.read(p)] == keys


def test_a_new_file_moves_no_other(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", files=200)
    before = read(folder, 0.2)
    (folder / "another.txt").write_text("another\n", encoding="utf-8")
    after = read(folder, 0.2)
    assert set(plain(before, True)) == set(plain(after, True)) - {"another\n"}
    assert before.hash != after.hash


def test_what_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="no text in it"):
        read(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "bad.txt").write_bytes(b"fine so far \xe2\x28 not here")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 12"):
        read(tmp_path)
    (tmp_path / "bad.txt").write_bytes("cut: ä".encode()[:-1])
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 5"):
        read(tmp_path)
    (tmp_path / "bad.txt").write_bytes("ä".encode() * (2**19) + b"\xff")
    with pytest.raises(UserError, match=rf"bad\.txt: not UTF-8 at byte {2**20}"):
        read(tmp_path)


def test_binary_files_are_left_out(tmp_path: Path) -> None:
    write_text(tmp_path, files=2)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    assert {p.name for p in read(tmp_path).parts} == {"file00.txt", "file01.txt"}


ROWS = [{"text": f"row {n} größe\n", "n": n, "other": {"a": [n]}} for n in range(50)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def write_rows(path: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(jsonl(ROWS)))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as f:
            f.write(jsonl(ROWS))
    else:
        path.write_bytes(jsonl(ROWS))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_has_the_same_documents(name: str, tmp_path: Path) -> None:
    found = read(write_rows(tmp_path / name))
    assert plain(found) == [r["text"] for r in ROWS]
    held = plain(found, True)
    assert 0 < len(held) < 20
    assert held == plain(read(write_rows(tmp_path / "b.jsonl")), True)


def test_a_folder_of_any_mix(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.parquet", "c/d.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name)
    (tmp_path / "z.txt").write_text("plain text", encoding="utf-8")
    (tmp_path / ".hidden.jsonl").write_text("not JSON", encoding="utf-8")
    assert texts(tmp_path) == [r["text"] for r in ROWS] * 3 + ["plain text"]


def test_lines_lie_in_one_part_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    for step in (1, 7, 64, 10_000):
        monkeypatch.setattr(rows, "STEP", step)
        assert texts(path) == [r["text"] for r in ROWS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_missing_column_names_those_that_are_there(name: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / name)
    with pytest.raises(UserError, match=r"no column 'body'; there are: n, other, text .*--data.text"):
        texts(path, text="body")
    with pytest.raises(UserError, match=r"no column 'messages'; there are: n, other, text .*--data.messages"):
        texts(path, messages="messages")
    with pytest.raises(UserError, match=r"(line|row) 1: column 'n' holds a int, not text"):
        texts(path, text="n")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "a.json: line 2: not JSON"),
        (b'[{"text": "a"}]\n', "line 1: a list, but rows are JSON objects .*jq"),
        (b'{\n "text": "a"\n}\n', "line 1: not JSON: .*one JSON object a line"),
        (b'{"text": "a"}\n\n5\n', "line 3: a int, but rows are JSON objects"),
        (b'{"text": "\xff"}\n', "not UTF-8 at byte 10"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"line 2: '\\ud800' is half a character"),
        (b'{"messages": [], "n": 1}\n', "no column 'text'; there are: messages, n .*--data.messages messages"),
    ],
)
def test_bad_lines_are_named(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=why):
        texts(tmp_path)


def test_a_table_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": column, "data": pa.array([b"x", b"y"])}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 1 or one soon behind it: not UTF-8"):
        texts(tmp_path)
    with pytest.raises(UserError, match="row 1: column 'data' holds a bytes, not text"):
        texts(tmp_path, text="data")


def test_rows_without_text_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n{"text": null}\n{"text": "a"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"PAR1 is how one begins, or \x1f\x8b, but this is neither")
    with pytest.raises(UserError, match=name):
        texts(tmp_path)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(jsonl(ROWS))[:200])
        with pytest.raises(UserError, match=name):
            texts(tmp_path)


def test_a_row_too_long_for_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data import digests

    for module in (digests, rows):
        monkeypatch.setattr(module, "LONGEST", 2**21)
    long = jsonl([{"text": "fine"}, {"text": "x" * 2**22}])
    (tmp_path / "a.jsonl").write_bytes(long)
    with pytest.raises(UserError, match=r"line 2: the row is longer than 2 MiB .*split it"):
        texts(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(long))
    with pytest.raises(UserError, match="line 2: the row is longer"):
        texts(tmp_path)


def test_hashes_of_large_files_are_remembered_until_they_change(tmp_path: Path) -> None:
    import os

    from train.data import digests

    path, cache = tmp_path / "large.txt", tmp_path / "cache"
    cache.mkdir()
    path.write_bytes(b"line\n" * 10**6)
    first = digests.digest(path, "text", cache)
    assert not list(cache.rglob("*.json"))  # it may still change within the clock's step
    old = path.stat().st_mtime - 100
    os.utime(path, (old, old))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(digests, "SETTLED", -1.0)
    assert digests.digest(path, "text", cache) == first
    assert len(list(cache.rglob("*.json"))) == 1
    monkey.setattr(digests, "_scan", lambda *a: pytest.fail("hashed twice"))
    assert digests.digest(path, "text", cache) == first
    monkey.undo()
    path.write_bytes(b"LINE\n" * 10**6)
    os.utime(path, (old, old))  # the same size and time, but not the same change
    assert digests.digest(path, "text", cache) != first


@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_survives_the_tokenizer(trained: TextTokenizer, text: str) -> None:
    [ids] = trained.encode([text])
    assert trained.fast.decode(ids, skip_special_tokens=False) == text
    assert trained.eos not in ids


def test_special_tokens_in_the_text_are_text(trained: TextTokenizer) -> None:
    [ids] = trained.encode([f"a{END}b"])
    assert trained.eos not in ids
    assert trained.fast.decode(ids) == f"a{END}b"


def test_every_row_is_a_token_and_training_is_deterministic(tmp_path: Path) -> None:
    documents = plain(read(write_text(tmp_path / "text")), False)
    found = tokenizer.train(documents, 5000, 32)
    assert sorted(found.fast.get_vocab().values()) == list(range(5000))
    assert any(t.startswith("<|unused_") for t in found.fast.get_vocab())
    assert tokenizer.train(documents, 5000, 32).hash == found.hash
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.train(documents, 256, 32)


def test_transformers_reads_the_same_tokenizer(trained: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in trained.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "if größe:\n    return 42  # λ\n\n"
    assert theirs(text)["input_ids"] == [trained.eos, *trained.encode([text])[0]]
    assert (theirs.bos_token, theirs.eos_token) == (END, END)
    ours = tokenizer.load(tmp_path)
    assert (ours.hash, ours.bos, ours.eos, ours.size) == (trained.hash, trained.bos, trained.eos, 400)


def test_tokenizers_that_cannot_be_used_are_named(trained: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a tokenizer"):
        tokenizer.load(tmp_path)
    for name, content in trained.files().items():
        (tmp_path / name).write_bytes(content)
    settings = {**trained.config, "eos_token": "<|nowhere|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"eos_token '<\|nowhere\|>' is not in the vocabulary"):
        _ = tokenizer.load(tmp_path).eos


def test_a_cache_that_cannot_be_written_is_named(
    options: Callable[..., dict[str, Any]], train: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory.*--data\.cache"):
        train(options(data__cache=str(tmp_path / "file" / "cache")))


def test_a_runs_sources_have_full_paths_and_survive_yaml() -> None:
    from spec.load import read_yaml
    from train import config

    mixture = [{"source": "a", "weight": 2}, {"source": "hf:x/y:c@v", "messages": "m", "template": "t.jinja"}]
    mixture += [{"source": "hf:./z", "messages": "m", "template": "chatml"}, {"source": "stdlib"}]
    c = config.layered({"data": {"mixture": mixture, "validation_source": "v"}})
    here = Path.cwd()
    assert [s.source for s in c.data.sources] == [str(here / "a"), "hf:x/y:c@v", f"hf:{here / 'z'}", "stdlib"]
    assert [s.template for s in c.data.sources] == [None, str(here / "t.jinja"), "chatml", None]
    assert c.data.validation_source == str(here / "v")
    assert config.layered(read_yaml(config.dump(c), "")) == c


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"mixture": [{"source": "a", "wieght": 2}]}, r"data.mixture\[0\].wieght: is not a field .did you mean weight"),
        ({"mixture": [{"source": "a", "weight": 0}]}, r"data.mixture\[0\].weight: 0"),
        ({"mixture": []}, "data.mixture: .* names no source"),
        ({"mixture": [{"source": "a"}], "source": "b"}, "data.source: .* contradicts data.mixture"),
        ({"prompt": "q"}, "data.completion: is missing"),
        ({"prompt": "q", "completion": "a", "messages": "m"}, "data.messages: 'm' contradicts prompt=q"),
        ({"template": "chatml"}, "data.template: .* has no chats"),
        ({"source": "a", "limit": 5}, "data.limit: 5 is for hf: datasets"),
        ({"source": "a", "split": "test"}, "data.split: 'test' is for hf: datasets"),
        ({"messages": "m", "text": "t"}, "data.text: 't' is not read, since rows are chats"),
        ({"mixture": [{"source": "a"}], "text": "t"}, "data.text: 't' is not that of a mixture's sources"),
    ],
)
def test_sources_that_contradict_themselves_are_named(data: dict[str, Any], why: str) -> None:
    from spec.errors import SpecError
    from train import config

    with pytest.raises(SpecError, match=why):
        config.layered({"data": data})
