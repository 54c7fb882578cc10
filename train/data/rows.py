"""Documents of JSON lines and parquet tables: one column's text, or a chat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from spec.errors import MissingDependency, UserError
from train.config.sources import Source
from train.data.digests import LONGEST, too_long
from train.data.document import Document, Kind, Message, Part, key_of, place
from train.data.files import COMPRESSIONS, DAMAGE, compression, opened, reason

LINES = (".jsonl", ".ndjson", ".json")
STEP = 2**20
"""Bytes of a part of lines."""
TABLE_STEP, BUFFER = 4 * 2**20, 2**20
"""Bytes, about, of a table that are in memory at a time, and that are read from its file."""


def kind(path: Path) -> Kind:
    """What a file is, by its name."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "lines" if last in LINES else "table" if last == ".parquet" else "text"


def parts(path: Path, name: str, what: Kind, size: int) -> Iterator[Part]:
    """A file of rows as parts; a compressed one is one part."""
    if what == "table":
        groups = [g.total_byte_size for g in _groups(path)]
        yield from (Part(path, name, what, n, n + 1, g) for n, g in enumerate(groups))
    elif compression(path):
        yield Part(path, name, what, 0, None, size)
    else:
        starts = range(0, size, STEP)
        yield from (Part(path, name, what, s, min(s + STEP, size), min(STEP, size - s)) for s in starts)


def read(part: Part, source: Source) -> Iterator[Document]:
    """The documents of a part; rows whose text is empty or null are none. Raises `UserError` naming the row."""
    found = _table(part, source) if part.kind == "table" else _lines(part)
    for at, row in found:
        content = _content(row, source, part, at)
        if not content:
            continue
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
        try:
            data = text.encode()
        except UnicodeEncodeError as e:
            raise UserError(
                f"{place(part, at)}: {e.object[e.start]!r} is half a character (half of a UTF-16 pair)"
            ) from None
        if len(data) > LONGEST:
            raise too_long(place(part, at))
        yield Document(content, key_of(data), len(data), part, at)


def _lines(part: Part) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """JSON objects of the lines that begin within a part, and at which bytes."""
    at = 0
    try:
        with opened(part.path) as f:
            at = _next_line(f, part.start)
            while part.stop is None or at < part.stop:
                line = f.readline(LONGEST + 1)
                if not line:
                    return
                if len(line) > LONGEST:
                    raise too_long(place(part, at))
                if line.strip():
                    yield at, _parsed(line, part, at)
                at += len(line)
    except DAMAGE as e:
        raise UserError(f"{part.path}: {reason(e)}") from None


def _next_line(f: BinaryIO, start: int) -> int:
    """Go to the first line that begins at `start` or behind it."""
    if not start:
        return 0
    f.seek(start - 1)
    return start - 1 + len(f.readline())


def _parsed(line: bytes, part: Part, at: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as e:
        raise UserError(f"{place(part, at)}: not UTF-8 at byte {e.start} of the line") from None
    except (ValueError, RecursionError) as e:
        hint = ""
        if at == 0 and line.lstrip()[:1] in (b"[", b"{"):
            hint = (
                " (rows are one JSON object a line: jq -c '.[]' FILE > FILE.jsonl, or name it .txt to read it as text)"
            )
        raise UserError(f"{place(part, at)}: not JSON: {e}{hint}") from None
    if not isinstance(row, dict):
        hint = " (jq -c '.[]' FILE > FILE.jsonl makes lines of an array)" if isinstance(row, list) else ""
        raise UserError(f"{place(part, at)}: a {type(row).__name__}, but rows are JSON objects{hint}")
    return row


def _table(part: Part, source: Source) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a part's row groups, and their numbers in the file."""
    import pyarrow as pa

    file = _parquet(part.path)
    meta = file.metadata
    assert part.stop is not None
    at = sum(meta.row_group(n).num_rows for n in range(part.start))
    there = file.schema_arrow.names
    for column in source.columns:
        if column not in there:
            raise missing(part.path, column, source, there)
    rows = sum(meta.row_group(n).num_rows for n in range(part.start, part.stop))
    few = max(1, min(4096, rows * TABLE_STEP // max(1, part.size)))
    try:
        groups = list(range(part.start, part.stop))
        for batch in file.iter_batches(few, row_groups=groups, columns=list(source.columns), use_threads=False):
            for row in batch.to_pylist():
                yield at, row
                at += 1
    except UnicodeDecodeError as e:
        raise UserError(f"{part.path}: row {at + 1} or one soon behind it: not UTF-8: {e.reason}") from None
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{part.path}: {reason(e)}") from None


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingDependency(f"{path}: parquet needs pyarrow: pip install 'allotrope[train]'") from None
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER)  # or a column of a row group is read at once
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a parquet file: {reason(e)}") from None


def _groups(path: Path) -> list[Any]:
    meta = _parquet(path).metadata
    return [meta.row_group(n) for n in range(meta.num_row_groups)]


def missing(where: object, column: str, source: Source, there: Iterable[Any]) -> UserError:
    """A column that is not there, and those that are."""
    names = sorted(map(str, there))
    chats = [n for n in names if n in ("messages", "conversations", "conversation")]
    field = next(f for f in ("messages", "prompt", "completion", "text") if getattr(source, f) == column)
    fix = f"name one with --data.{field}"
    if chats and not source.chat:
        fix += f", or --data.messages {chats[0]} for chats"
    return UserError(f"{where}: no column {column!r}; there are: {', '.join(names) or 'none'} ({fix})")


def _content(row: Mapping[str, Any], source: Source, part: Part, at: int) -> str | list[Message] | None:
    for column in source.columns:
        if column not in row:
            raise missing(place(part, at), column, source, row)
    if source.messages is not None:
        value = row[source.messages]
        return None if value is None else _messages(value, source.messages, part, at)
    if source.prompt is not None and source.completion is not None:
        return [*_turns(row, source.prompt, "user", part, at), *_turns(row, source.completion, "assistant", part, at)]
    value = row[source.text]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place(part, at)}: column {source.text!r} holds a {_kind_of(value)}, not text")
    return value


def _turns(row: Mapping[str, Any], column: str, role: str, part: Part, at: int) -> list[Message]:
    value = row[column]
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, column, part, at)


def _messages(value: Any, column: str, part: Part, at: int) -> list[Message]:
    if not isinstance(value, list):
        rule = "not a list of {role, content}"
        raise UserError(f"{place(part, at)}: column {column!r} holds a {_kind_of(value)}, {rule}")
    out: list[Message] = []
    for n, m in enumerate(value):
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            has = f"; it has: {', '.join(map(str, m))}" if isinstance(m, dict) else ""
            raise UserError(f"{place(part, at)}: {column}[{n}] is not {{role, content}}{has}")
        # A table has every key in every message, null where it has no value.
        kept = {k: v for k, v in m.items() if v is not None}
        content = kept.get("content")
        if content is None and "tool_calls" not in kept:
            raise UserError(f"{place(part, at)}: {column}[{n}] has no content")
        out.append({**kept, "content": content or ""})
    return out


def _kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__
