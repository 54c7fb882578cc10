"""Tokens in shards: what is in them, who makes them, and what interruption leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spec.errors import UserError
from train import config
from train.config import Data
from train.data import long, prepare, tokenizer, tokens, workers
from train.data.store import Shards, TokenData
from train.data.tokenizer import END, TextTokenizer
from train.tests.conftest import write_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = write_text(tmp_path_factory.mktemp("text"))
    return tokenizer.train([p.read_text(encoding="utf-8") for p in sorted(folder.iterdir())], 400, 32)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few files each, that several processes make."""
    monkeypatch.setattr(tokens, "SMALLEST", 8_000)
    monkeypatch.setattr(workers, "ALONE", 0)


def made(tok: TextTokenizer, cache: Path, progress: Callable[[int], None] = lambda n: None, **fields: Any) -> TokenData:
    cache.mkdir(exist_ok=True)
    data: Data = config.layered({"data": {"validation": 0.2, "workers": 1, **fields}}).data
    return prepare.tokenize(prepare.read(data, cache), tok, cache, data.workers, progress)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def documents(tok: TextTokenizer, data: TokenData, which: str = "train") -> list[str]:
    [split] = getattr(data, which)
    spans = zip(split.offsets[:-1], split.offsets[1:] + split.overlap, strict=True)
    return [tok.fast.decode(list(split.tokens[a:b]), skip_special_tokens=False) for a, b in spans]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_tokens_are_cached_by_content(tok: TextTokenizer, tmp_path: Path) -> None:
    folder, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    seen: list[int] = []
    first = made(tok, cache, seen.append, source=str(folder))
    assert sum(seen) == first.train[0].bytes + first.validation[0].bytes
    again = made(tok, cache, lambda n: pytest.fail("tokenised twice"), source=str(folder))
    assert np.array_equal(first.train[0].tokens[:], again.train[0].tokens[:])
    assert again.fingerprint == first.fingerprint
    (folder / "file00.txt").write_text("changed", encoding="utf-8")
    assert made(tok, cache, source=str(folder)).fingerprint != first.fingerprint


def test_documents_lie_between_their_beginnings_and_ends(tok: TextTokenizer, tmp_path: Path) -> None:
    texts = [f"alpha {n}" for n in range(40)]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    shared = made(tok, tmp_path / "cache", source=str(file))
    assert len(shared.train[0].tokens) == int(shared.train[0].offsets[-1]) + 1
    held = documents(tok, shared, "validation")
    assert 0 < len(held) < 20
    assert sorted(documents(tok, shared) + held) == sorted(f"{END}{t}{END}" for t in texts)
    own = TextTokenizer(tok.json, {**tok.config, "bos_token": "<|unused_0|>", "add_bos_token": True})
    apart = made(own, tmp_path / "cache", source=str(file))
    assert apart.train[0].overlap == 0
    assert sorted(documents(own, apart) + documents(own, apart, "validation")) == sorted(
        f"<|unused_0|>{t}{END}" for t in texts
    )
    assert apart.fingerprint != shared.fingerprint


@pytest.mark.usefixtures("small_shards")
def test_any_number_of_processes_makes_the_same_files(tok: TextTokenizer, tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", files=30)
    write_jsonl(folder / "more.jsonl", [f"beta größe {n}" for n in range(2000)])
    folders: list[dict[str, bytes]] = []
    for count in (1, 3):
        cache = tmp_path / f"cache{count}"
        made(tok, cache, source=str(folder), workers=count)
        [found] = cache.glob("tokens-*")
        folders.append(contents(found))
    assert folders[0] == folders[1]
    assert sum(name.endswith(".train.bin") for name in folders[0]) >= 4


@pytest.mark.usefixtures("small_shards")
def test_a_bad_row_ends_all_processes_with_its_place(tok: TextTokenizer, tmp_path: Path) -> None:
    for n in range(20):
        write_jsonl(tmp_path / f"{n:02d}.jsonl", [f"alpha {n} {m}" for m in range(500)])
    with (tmp_path / "13.jsonl").open("a", encoding="utf-8") as f:
        f.write('{"body": "x"}\n')
    monkey = pytest.MonkeyPatch()
    monkey.setattr("train.data.corpus.SMALL", 0)  # or reading it for what is held out would find it first
    with monkey.context(), pytest.raises(UserError, match=r"13\.jsonl: line 501: no column 'text'; there are: body"):
        made(tok, tmp_path / "cache", source=str(tmp_path), workers=2)
    monkey.undo()


PREPARE = """
import sys
from pathlib import Path
from train.data import tokens, workers
tokens.SMALLEST = 100_000
workers.ALONE = 0
from train.cli import main
main(["prepare", "--data", sys.argv[1], "--spec", sys.argv[2], "--data.cache", sys.argv[3], "--data.workers", "2"])
"""


def start(text: Path, spec: Path, cache: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """`python -m train prepare` with small shards, in a process of its own that may write files of `limit` bytes."""
    program = cache.parent / "program.py"
    guarded = PREPARE.replace("from train.cli", 'if __name__ == "__main__":\n    from train.cli').replace(
        "\nmain", "\n    main"
    )
    program.write_text(guarded, encoding="utf-8")

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, str(program), str(text), str(spec), str(cache)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=restrict,
    )  # fmt: skip


def test_killed_work_goes_on_where_it_was(spec_file: Path, tmp_path: Path) -> None:
    folder, cache = write_text(tmp_path / "text", files=12), tmp_path / "cache"
    write_jsonl(folder / "rows.jsonl", [f"delta größe {n} " * 20 for n in range(8_000)])
    first = start(folder, spec_file, cache)
    deadline = time.monotonic() + 60
    while len(done := list(cache.glob("tokens-*/0*.json"))) < 2 and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    first.kill()
    first.communicate()  # ends when its processes have ended, too: they hold its output
    [found] = cache.glob("tokens-*")
    assert not (found / "meta.json").is_file()
    done = list(found.glob("0*.json"))
    before = {p.name: p.stat().st_mtime_ns for p in done}
    second = start(folder, spec_file, cache)
    _, told = second.communicate(timeout=120)
    assert second.returncode == 0, told
    assert {p.name: p.stat().st_mtime_ns for p in done} == before
    assert not list(found.glob(".*"))
    assert contents(found) == whole(folder, spec_file, tmp_path)


def whole(folder: Path, spec: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes that nobody interrupts."""
    data = {"source": str(folder), "cache": str(tmp_path / "whole"), "workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SMALLEST", 100_000)
        prepare.ahead(config.layered({"data": data, "spec": str(spec)}), Console(quiet=True))
    return contents(next((tmp_path / "whole").glob("tokens-*")))


def test_two_at_a_time_make_the_same_and_a_full_disk_is_named(spec_file: Path, tmp_path: Path) -> None:
    folder, cache = write_text(tmp_path / "text", files=12), tmp_path / "cache"
    write_jsonl(folder / "rows.jsonl", [f"delta größe {n} " * 20 for n in range(1_500)])
    full = start(folder, spec_file, cache, limit=40_000)
    _, told = full.communicate(timeout=120)
    assert full.returncode == 2
    [line] = told.strip().splitlines()
    assert "cannot store the tokens: File too large" in line
    assert "--data.cache" in line
    both = [start(folder, spec_file, cache) for _ in range(2)]
    assert [(p.communicate(timeout=120), p.returncode)[1] for p in both] == [0, 0]
    [found] = cache.glob("tokens-*")
    assert not list(found.glob(".*"))
    assert contents(found) == whole(folder, spec_file, tmp_path)


def test_a_damaged_cache_is_named(tok: TextTokenizer, tmp_path: Path) -> None:
    folder, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    made(tok, cache, source=str(folder))
    [file] = cache.glob("tokens-*/*.train.bin")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.bin: the cached tokens are damaged \(remove "):
        made(tok, cache, source=str(folder))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), a=st.integers(0, 200), b=st.integers(0, 200))
def test_shards_read_like_one_array(sizes: list[int], a: int, b: int, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 60_000, n).astype("<u2") for n in sizes]
    bits = [v % 3 == 0 for v in values]
    for n, (v, m) in enumerate(zip(values, bits, strict=True)):
        v.tofile(folder / f"{n}.bin")
        np.packbits(m, bitorder="little").tofile(folder / f"{n}.mask")
    ends = tuple(np.cumsum(sizes).tolist())
    numbers = Shards(tuple(folder / f"{n}.bin" for n in range(len(sizes))), ends, "<u2")
    marks = Shards(tuple(folder / f"{n}.mask" for n in range(len(sizes))), ends, "bits")
    assert np.array_equal(numbers[a:b], np.concatenate(values)[a:b])
    assert np.array_equal(marks[a:b], np.concatenate(bits)[a:b])
    assert (numbers[a:b].dtype, marks[a:b].dtype) == (np.uint16, np.bool_)


def sentencepiece_like() -> TextTokenizer:
    """A tokenizer that puts a space before a text, without a pre-tokenizer, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Replace("▁", " ")
    words = ["one", "two", "three", "four", "größe"]
    alphabet = sorted({c for w in words for c in w} | {"▁"})
    fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while it learns: no token crosses words
    trainer = trainers.BpeTrainer(
        vocab_size=120, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    fast.train_from_iterator([" ".join(words)] * 50, trainer)
    fast.pre_tokenizer = None  # type: ignore[assignment]
    return TextTokenizer(fast.to_str(), {"eos_token": "</s>"})


@pytest.mark.parametrize("kind", ["bytes", "spaced"])
def test_long_documents_have_the_tokens_that_they_have_as_a_whole(
    kind: str, tok: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tok if kind == "bytes" else sentencepiece_like()
    text = "one two  three\n\nfour größe; it's 'two' 1234 " * 300 if kind == "bytes" else "one two three größe " * 300
    assert chosen.seam == (0 if kind == "bytes" else 1)
    [whole] = chosen.encode([text])
    monkeypatch.setattr(long, "PIECE", 500)
    monkeypatch.setattr(long, "LOOKED", 200)
    seen: list[int] = []
    arrays = TextTokenizer.arrays
    monkeypatch.setattr(TextTokenizer, "arrays", lambda self, t: (seen.extend(map(len, t)), arrays(self, t))[1])
    short, ids = long.encode(chosen, ["one", text])
    assert max(seen) <= 1000
    assert ids.tolist() == whole
    assert short.tolist() == chosen.fast.encode("one").ids[-len(short) :]
    # Without a place to cut, nothing is lost.
    if kind == "bytes":
        [ids] = long.encode(chosen, ["λ" * 5000])
        assert chosen.fast.decode(ids.tolist()) == "λ" * 5000


def test_a_mixture_has_a_split_a_source_and_validation_may_come_from_its_own(
    tok: TextTokenizer, tmp_path: Path
) -> None:
    a, b, v = (write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {m}" for m in range(60)]) for n in ("a", "b", "v"))
    mixture = [{"source": str(a), "weight": 3}, {"source": str(b)}]
    both = made(tok, tmp_path / "cache", mixture=mixture)
    assert (both.weights, len(both.train), len(both.validation)) == ((3.0, 1.0), 2, 2)
    apart = made(tok, tmp_path / "cache", mixture=mixture, validation_source=str(v))
    assert [s.documents for s in (*apart.train, *apart.validation)] == [60, 60, 60]
    assert documents(tok, apart, "validation") == [f"{END}v {m}{END}" for m in range(60)]
    assert apart.fingerprint != both.fingerprint


def test_a_tokenizer_of_a_large_text_sees_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SAMPLE", 20_000)
    write_jsonl(tmp_path / "a.jsonl", [f"alpha {m} " * 50 for m in range(300)])
    (tmp_path / "cache").mkdir()
    data = config.layered({"data": {"source": str(tmp_path / "a.jsonl")}}).data
    sample = list(prepare._sample(prepare.read(data, tmp_path / "cache")))
    assert 15_000 < sum(map(len, sample)) < 30_000


def test_what_is_prepared_ahead_is_found_by_the_run(
    options: Callable[..., dict[str, Any]],
    train: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from train.cli import main

    data = options(steps=2, samples__every=0)
    how = ["--spec", data["spec"], "--data", data["data"]["source"], "--data.cache", data["data"]["cache"]]
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *how, "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    [of] = told["train"]
    assert of["source"] == data["data"]["source"]
    assert of["tokens"] > of["documents"] > 5
    assert told["tokenizer"]["tokens"] == 300
    assert Path(of["folder"]).is_dir()
    monkeypatch.setattr(tokens, "make", lambda *a: pytest.fail("tokenised twice"))
    monkeypatch.setattr(tokenizer, "train", lambda *a: pytest.fail("trained twice"))
    assert train(data).step == 2
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *how])
    assert "cached in" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--data", "/nowhere"])
    assert ended.value.code == 2
    assert "no such file or folder" in capsys.readouterr().err


MEASURE = """
import resource, sys
from pathlib import Path
from train import config
from train.data import prepare, tokenizer
data = config.layered({"data": {"source": sys.argv[1], "workers": 1}}).data
tok = tokenizer.train(["one two three four"] * 100, 300, 32)
cache = Path(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
made = prepare.tokenize(prepare.read(data, cache), tok, cache, 1)
print(peak() - before, len(made.train[0].tokens))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "letters"])
def test_a_line_of_hundreds_of_megabytes_costs_little_memory(kind: str, tmp_path: Path) -> None:
    rng, letters = np.random.default_rng(0), np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    size = (200 if kind == "words" else 40) * 2**20
    with (tmp_path / "line.txt").open("wb") as f:
        while f.tell() < size:  # letters: no place to cut, and nothing that repeats
            f.write(b"one two three " * 75_000 if kind == "words" else rng.choice(letters, 2**20).tobytes())
    (tmp_path / "cache").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "line.txt"), str(tmp_path / "cache")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    megabytes, count = map(int, done.stdout.split())
    assert megabytes < 100
    assert count > size / 10


@pytest.mark.slow
def test_a_json_line_of_two_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "line.jsonl").open("wb") as f:
        f.write(b'{"text": "')
        for _ in range(2048):
            f.write(b"x" * 2**20)
        f.write(b'"}\n')
    began = time.monotonic()
    with pytest.raises(UserError, match="line 1: the row is longer than 64 MiB"):
        prepare.read(config.layered({"data": str(tmp_path / "line.jsonl")}).data, tmp_path)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_ctrl_c_ends_the_work_and_its_processes(spec_file: Path, tmp_path: Path) -> None:
    folder, cache = write_text(tmp_path / "text", files=12), tmp_path / "cache"
    write_jsonl(folder / "rows.jsonl", [f"delta größe {n} " * 20 for n in range(40_000)])
    run = start(folder, spec_file, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("tokens-*/0*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 130
    assert told.strip() == "interrupted before there was anything to save"
