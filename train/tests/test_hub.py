"""`hf:` datasets, read with the datasets library from folders of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spec.errors import UserError
from train.config.sources import Source
from train.data import corpus, hub

datasets = pytest.importorskip("datasets")
TEXTS = [f"row {n} größe" for n in range(100)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as the library writes it: parquet for one split, JSON lines for another."""
    made = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(100)), "more": [{"a": 1}] * 100})
    out = tmp_path / "dataset"
    out.mkdir()
    made.to_parquet(str(out / "train-00000.parquet"))
    made.select(range(3)).to_parquet(str(out / "test-00000.parquet"))
    return out


def texts(path: Path, cache: Path, **fields: Any) -> list[Any]:
    cache.mkdir(exist_ok=True)
    found = corpus.read(Source(source=f"hf:{path}", **fields), cache=cache)
    return [d.content for d in found.documents()]


def test_a_split_is_streamed_once_and_then_read_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert texts(folder, cache) == TEXTS
    assert texts(folder, cache, split="test") == TEXTS[:3]
    assert texts(folder, cache, limit=7) == TEXTS[:7]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("fetched twice"))
    assert texts(folder, cache) == TEXTS
    stored = sum(f.stat().st_size for f in cache.glob("hf-*/rows/*.parquet"))
    assert stored < 20_000  # the other columns are left where they are


def test_an_interrupted_fetch_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(hub, "ROWS", 10)
    write, seen = hub._write, []

    def interrupted(path: Path, value: Any) -> None:
        write(path, value)
        seen.append(value)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        texts(folder, cache)
    assert seen[-1]["rows"] == 30
    kept = {p: p.stat().st_mtime_ns for p in cache.glob("hf-*/rows/*.parquet")}
    assert len(kept) == 3
    assert texts(folder, cache) == TEXTS
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert seen[3]["rows"] == 40


def test_a_changed_folder_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    assert texts(folder, tmp_path / "cache") == TEXTS
    datasets.Dataset.from_dict({"text": ["another"]}).to_parquet(str(folder / "train-00000.parquet"))
    assert texts(folder, tmp_path / "cache") == ["another"]


def test_chats_are_streamed(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}]} for n in range(3)
    ]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert texts(tmp_path / "chats", tmp_path / "cache", messages="messages") == [r["messages"] for r in rows]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"split": "validation"}, r"Bad split: validation. Available splits: \['t"),
        ({"text": "body"}, "no column 'body'; there are: more, n, text"),
    ],
)
def test_what_is_not_there_is_named(fields: dict[str, Any], why: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        texts(folder, tmp_path / "cache", **fields)


def test_names_are_taken_apart(tmp_path: Path) -> None:
    assert hub.parsed("hf:a/b") == hub.Dataset("a/b", None, None)
    assert hub.parsed("hf:a/b:c@v1") == hub.Dataset("a/b", "c", "v1")
    assert hub.parsed("hf:a/b@v1") == hub.Dataset("a/b", None, "v1")
    with pytest.raises(UserError, match=r"not hf:OWNER/NAME"):
        hub.parsed("hf:")
    with pytest.raises(UserError, match=r"nowhere: Couldn't find any data file"):
        texts(Path("/nowhere"), tmp_path)
