"""Corpus, tokenizer and token data."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.errors import UserError
from train.data import corpus, tokenizer
from train.data.batches import IGNORE, Batches, DataState, Sequences, validation_rows
from train.data.store import Split
from train.data.tokenizer import END, TextTokenizer
from train.data.tokens import prepare
from train.tests.conftest import write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    documents = corpus.read(str(write_text(tmp_path_factory.mktemp("text"))), 0.1).train
    return tokenizer.train(documents, 400, 32)


def test_the_standard_library_is_there_without_tests_and_held_out_by_file() -> None:
    found = corpus.read("stdlib", 0.05)
    assert found.size > 4e6
    names = {d.name for d in found.train} | {d.name for d in found.validation}
    assert {"typing.py", "json/decoder.py"} <= names
    assert not any(part in ("test", "tests", "idlelib", "site-packages") for n in names for part in n.split("/"))
    assert not {d.name for d in found.train} & {d.name for d in found.validation}
    assert 0.005 < sum(d.size for d in found.validation) / found.size < 0.2
    assert corpus.read("stdlib", 0.05) == found
    root = Path(sysconfig.get_path("stdlib"))
    assert sum(d.size for d in (*found.train, *found.validation) if d.name == "typing.py") == (
        (root / "typing.py").stat().st_size
    )


@pytest.mark.parametrize("line", ["wörter und λ\n", "ohne Zeilenende λ", "x"])
def test_a_large_file_is_cut_without_loss(line: str, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    text = line * 60_000
    path.write_text(text, encoding="utf-8")
    found = corpus.read(str(path), 0.1)
    documents = sorted((*found.train, *found.validation), key=lambda d: d.start)
    assert len(documents) >= 10
    assert found.validation
    assert "".join(d.text() for d in documents) == text


def test_a_new_file_moves_no_other(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", files=200)
    before = corpus.read(str(folder), 0.2)
    (folder / "another.txt").write_text("another\n", encoding="utf-8")
    after = corpus.read(str(folder), 0.2)
    assert {d.name for d in before.validation} == {d.name for d in after.validation} - {"another.txt"}
    assert before.hash != after.hash


def test_what_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="no text in it"):
        corpus.read(str(tmp_path), 0.1)
    (tmp_path / "bad.txt").write_bytes(b"fine so far \xe2\x28 not here")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 12"):
        corpus.read(str(tmp_path), 0.1)
    (tmp_path / "bad.txt").write_bytes("cut: ä".encode()[:-1])
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 5"):
        corpus.read(str(tmp_path), 0.1)
    (tmp_path / "bad.txt").write_bytes("ä".encode() * (2**19) + b"\xff")
    with pytest.raises(UserError, match=rf"bad\.txt: not UTF-8 at byte {2**20}"):
        corpus.read(str(tmp_path), 0.1)


def test_binary_files_are_left_out(tmp_path: Path) -> None:
    write_text(tmp_path, files=2)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    found = corpus.read(str(tmp_path), 0.1)
    assert {d.name for d in (*found.train, *found.validation)} == {"file00.txt", "file01.txt"}


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
    documents = corpus.read(str(write_text(tmp_path / "text")), 0.1).train
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


def test_tokens_are_cached_by_content(trained: TextTokenizer, tmp_path: Path) -> None:
    folder, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    cache.mkdir()
    seen: list[int] = []
    first = prepare(corpus.read(str(folder), 0.2), trained, cache, seen.append)
    assert sum(seen) == first.train[0].bytes + first.validation[0].bytes
    again = prepare(corpus.read(str(folder), 0.2), trained, cache, lambda n: pytest.fail("tokenised twice"))
    assert np.array_equal(first.train[0].tokens[:], again.train[0].tokens[:])
    (folder / "file00.txt").write_text("changed", encoding="utf-8")
    assert prepare(corpus.read(str(folder), 0.2), trained, cache).fingerprint != first.fingerprint
    texts = trained.fast.decode(list(first.validation[0].tokens[:]), skip_special_tokens=False).split(END)
    held = sorted(corpus.read(str(folder), 0.2).validation, key=lambda d: d.name)
    assert {d.text() for d in held if d.name != "file00.txt"} <= set(texts)


def stream(*documents: list[int]) -> Split:
    offsets = np.cumsum([0, *(len(d) + 1 for d in documents)])
    return Split(np.array([0, *(t for d in documents for t in [*d, 0])], np.uint16), offsets, 100, 1)


def counted(count: int) -> Split:
    return Split(np.arange(count, dtype=np.uint16), np.array([0, count]), 1)


def test_every_epoch_has_every_sequence_once_in_another_order() -> None:
    sequences = Sequences(counted(4 * 25 + 1), 4, 0, 0, False)
    batches = Batches(sequences, DataState("f", seed=3))
    rows = [batches.next(5, 5)[0][0].ids for _ in range(10)]
    first, second = np.concatenate(rows[:5])[:, 0] // 4, np.concatenate(rows[5:])[:, 0] // 4
    assert sorted(first) == sorted(second) == list(range(25))
    assert list(first) != list(second)
    s = batches.state
    assert (s.epoch, s.batches, s.sequences, s.tokens) == (2, 10, 50, 200)


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_the_order_depends_neither_on_ranks_nor_on_accumulation(micro: int, world: int) -> None:
    sequences = Sequences(counted(4 * 25 + 1), 4, 0, 0, False)
    whole, valid = Batches(sequences, DataState("f")).next(8, 8)
    shares = [Batches(sequences, DataState("f")).next(8, micro, r, world) for r in range(world)]
    assert {v for _, v in shares} == {valid} == {32}
    turns = zip(*(share for share, _ in shares), strict=True)
    assert np.array_equal(np.concatenate([rows.ids for turn in turns for rows in turn]), whole[0].ids)


def test_masked_documents_end_but_do_not_predict_each_other() -> None:
    rows = Sequences(stream([5, 6], [7], [8, 9]), 8, 0, 0, True).rows([0])
    assert rows.ids.tolist() == [[0, 5, 6, 0, 7, 0, 8, 9]]
    assert rows.targets.tolist() == [[5, 6, 0, 7, 0, 8, 9, 0]]
    assert rows.segments is not None
    assert np.diff(rows.segments[0]).tolist() == [0, 0, 1, 0, 1, 0, 0]
    # With a beginning of its own (1), an end (0) does not predict it.
    split = Split(np.array([1, 5, 6, 0, 1, 7, 0, 1, 8], np.uint16), np.array([0, 9]), 100)
    rows = Sequences(split, 8, 0, 1, True).rows([0])
    assert rows.targets.tolist() == [[5, 6, 0, IGNORE, 7, 0, IGNORE, 8]]
    assert rows.segments is not None
    assert np.diff(rows.segments[0]).tolist() == [0, 0, 0, 1, 0, 0, 1]
    # Without one, the token behind an end begins the next document.
    split = Split(np.array([5, 6, 0, 7, 0, 8, 9], np.uint16), np.array([0, 9]), 100)
    rows = Sequences(split, 6, 0, None, True).rows([0])
    assert rows.targets.tolist() == [[6, 0, IGNORE, 0, IGNORE, 9]]


def test_a_stream_shorter_than_a_sequence_is_padded_without_targets() -> None:
    sequences = Sequences(stream([5, 6]), 8, 0, 0, False)
    assert sequences.count == 1
    rows = sequences.rows([0])
    assert rows.ids.tolist() == [[0, 5, 6, 0, 0, 0, 0, 0]]
    assert rows.targets.tolist() == [[5, 6, 0] + [IGNORE] * 5]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_scores_the_same_tokens_on_any_number_of_ranks(world: int) -> None:
    sequences = Sequences(counted(4 * 10 + 1), 4, 0, 0, False)
    shares = [list(validation_rows(sequences, 28, 2, r, world)) for r in range(world)]
    assert len({len(s) for s in shares}) == 1
    targets = np.concatenate([r.targets.ravel() for s in shares for r in s])
    whole = np.concatenate([r.targets.ravel() for r in validation_rows(sequences, 28, 7)])
    assert sorted(targets[targets != IGNORE]) == sorted(whole)
    assert len(whole) == 28


def test_a_cache_that_cannot_be_written_is_named(
    options: Callable[..., dict[str, Any]], train: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory.*--data\.cache"):
        train(options(data__cache=str(tmp_path / "file" / "cache")))
