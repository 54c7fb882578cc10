"""Text to windows of ids: from a file, a folder, JSON lines, what Python brings; and what is no text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Tokenizer
from convert.calibrate import sample as samples
from convert.calibrate.sample import sample
from spec import Spec
from spec.errors import UserError

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", " ", "\n", ".", "é", "<s>"]


def letters(**fields: Any) -> Tokenizer:
    """A tokenizer of single characters."""
    vocabulary = {c: i for i, c in enumerate(LETTERS)}
    return Tokenizer(
        {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
            "decoder": None,
            "added_tokens": [{"id": vocabulary["<s>"], "content": "<s>", "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False, "special": True}],
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None},
        },
        **fields,
    )  # fmt: skip


def decoded(ids: np.ndarray) -> list[str]:
    return ["".join(LETTERS[i] for i in window) for window in ids]


def test_a_short_text_is_one_window_of_its_length(tmp_path: Path, small: Spec) -> None:
    (tmp_path / "a.txt").write_text("hello there")
    found = sample(small, letters(), str(tmp_path / "a.txt"), 1024)
    assert decoded(found.ids) == ["hello there"] and found.tokens == 11 and found.asked == 1024
    assert found.name == "a.txt"


def test_windows_have_one_length_and_lie_evenly_in_the_text(tmp_path: Path, small: Spec) -> None:
    text = "".join(f"line {i} of many.\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    found = sample(small, letters(), str(tmp_path / "a.txt"), 4 * small.context)
    assert found.ids.shape == (4, small.context)
    numbers = [int(re.findall(r"line (\d+) of", window)[0]) for window in decoded(found.ids)]
    assert numbers[0] < 10 and numbers == sorted(numbers) and numbers[-1] > 700
    for window in decoded(found.ids):
        assert window in text


def test_bos_begins_every_window_where_the_tokenizer_adds_it(tmp_path: Path, small: Spec) -> None:
    (tmp_path / "a.txt").write_text("abc " * 1000)
    found = sample(small, letters(bos="<s>", add_bos=True), str(tmp_path / "a.txt"), 3 * small.context)
    assert found.ids.shape == (3, small.context) and (found.ids[:, 0] == LETTERS.index("<s>")).all()
    assert (found.ids[:, 1:] != LETTERS.index("<s>")).all()
    assert (sample(small, letters(bos="<s>"), str(tmp_path / "a.txt"), 64).ids != LETTERS.index("<s>")).all()


def test_of_a_large_file_passages_are_read(tmp_path: Path, small: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large.txt").open("w") as f:
        f.writelines(f"row {i} é\n" for i in range(400_000))
    read = 0
    whole = samples._decoded

    def counted(d: Any, start: int, data: bytes, **named: Any) -> str:
        nonlocal read
        read += len(data)
        return whole(d, start, data, **named)

    monkeypatch.setattr(samples, "_decoded", counted)
    found = sample(small, letters(), str(tmp_path / "large.txt"), 8 * small.context)
    assert found.ids.shape == (8, small.context)
    assert read <= 8 * 16 * small.context
    numbers = [int(re.findall(r"row (\d+) é\n", w)[0]) for w in decoded(found.ids)]
    assert numbers[0] < 100 and numbers[-1] > 300_000


def test_a_folder_and_json_lines_are_read(tmp_path: Path, small: Spec) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first ")
    (tmp_path / "b" / "c.jsonl").write_text(
        "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in ("second", "third"))
    )
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe")
    found = sample(small, letters(), str(tmp_path), 64)
    assert decoded(found.ids) == ["first second\n\nthird"]


def test_of_large_json_lines_whole_ones_are_read_however_long_they_are(tmp_path: Path, small: Spec) -> None:
    lines = [json.dumps({"text": "word " * 2000 + f"end of {i}."}) + "\n" for i in range(30)]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    found = sample(small, letters(), str(tmp_path / "x.jsonl"), 4 * small.context)
    assert found.ids.shape == (4, small.context)


def test_what_python_brings_is_enough_and_no_quality_text(small: Spec) -> None:
    from convert.verify.sample import _MODULES

    assert not set(samples.STDLIB) & set(_MODULES)
    sizes = [d.size for d in samples._documents("stdlib")]
    assert sum(sizes) > 500_000


def test_random_ids_are_asked_for_by_name_and_seeded(small: Spec) -> None:
    first = sample(small, None, "random", 256, seed=3)
    assert first.ids.shape == (2, small.context) and first.name == "random"
    assert np.array_equal(first.ids, sample(small, None, "random", 256, seed=3).ids)
    assert first.hash != sample(small, None, "random", 256, seed=4).hash


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_text(" \n\n\n"), "0 tokens are no text"),
        (lambda p: p.write_text("a"), "1 tokens are no text"),
        (lambda p: p.write_bytes(b"abc\xff\xfe def"), "not UTF-8 at byte 3"),
        (lambda p: p.mkdir(), "no text in it"),
    ],
    ids=["missing", "empty", "blank", "one-token", "binary", "folder"],
)
def test_what_is_no_text_is_named(tmp_path: Path, small: Spec, make: Any, says: str) -> None:
    make(tmp_path / "x.txt")
    with pytest.raises(UserError, match=f"--calibrate .*x.txt: .*{says}"):
        sample(small, letters(), str(tmp_path / "x.txt"), 64)


@pytest.mark.parametrize(("line", "says"), [("{", "no JSON"), ('{"txt": "a"}', "no string called text")])
def test_a_bad_json_line_is_named_by_its_place(tmp_path: Path, small: Spec, line: str, says: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"the line at byte 17 .*{says}"):
        sample(small, letters(), str(tmp_path / "x.jsonl"), 64)


def test_a_source_without_tokenizer_is_refused_with_what_helps(small: Spec) -> None:
    with pytest.raises(UserError, match=r"no tokenizer.*--effort fast.*random"):
        sample(small, None, "stdlib", 64)
