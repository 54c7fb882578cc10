"""`hf:` datasets: streamed once into parquet files in the cache, and from there on like any other files.

What is fetched is one revision of a dataset, so that what was trained on can be named. An interrupted fetch goes on
where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec.errors import MissingDependency, UserError
from train.config.sources import HUB, Source

log = logging.getLogger(__name__)

NAME = re.compile(r"(?P<path>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
ROWS, BYTES = 50_000, 128 * 2**20
"""Rows and bytes of text, about, in a file at most."""
DONE, ROWS_FOLDER = "done.json", "rows"


@dataclass(frozen=True)
class Dataset:
    """What `hf:` names."""

    path: str
    config: str | None
    revision: str | None

    @property
    def local(self) -> bool:
        """A folder on this machine, as `datasets` reads them."""
        return self.path.startswith(("/", ".", "~"))


def parsed(source: str) -> Dataset:
    """OWNER/NAME[:CONFIG][@REVISION]. Raises `UserError`."""
    found = NAME.fullmatch(source.removeprefix(HUB))
    if found is None:
        raise UserError(f"--data {source}: not hf:OWNER/NAME[:CONFIG][@REVISION]")
    return Dataset(found["path"], found["config"], found["revision"])


def fetch(source: Source, cache: Path) -> Path:
    """The folder with the dataset's rows, fetched now if it is not there. Raises `UserError` naming what is missing."""
    dataset = parsed(source.source)
    revision = _revision(dataset, cache)
    state = _state(Path(dataset.path).expanduser()) if dataset.local else revision
    wanted = [dataset.path, dataset.config, state, source.split, source.limit, *source.columns]
    folder = cache / f"hf-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:32]}"
    if not (folder / DONE).is_file():
        try:
            (folder / ROWS_FOLDER).mkdir(parents=True, exist_ok=True)
            _stream(dataset, revision, source, folder)
        except UserError:
            raise
        except Exception as e:  # of the network's libraries, or of the disk
            if isinstance(e, OSError) and e.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EFBIG,
                errno.EACCES,
                errno.EROFS,
            ):
                told = f"cannot store the dataset: {e.strerror}; what is fetched is kept (try --data.cache FOLDER)"
                raise UserError(f"{folder}: {told}") from None
            raise _failed(source, e) from None
    return folder / ROWS_FOLDER


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """What the file system says of a local folder's files."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    stats = [(str(p), p.stat()) for p in files]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def _stream(dataset: Dataset, revision: str | None, source: Source, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    state = folder / "state.json"
    at: dict[str, Any] = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {"files": 0, "rows": 0}
    rows = _rows(dataset, revision, source)
    if "stream" in at:
        rows.load_state_dict(at["stream"])
    log.warning("%s: fetching%s", source.source, f" from row {at['rows']:,} on" if at["rows"] else "")
    for group in _groups(rows, source, at["rows"]):
        path = folder / ROWS_FOLDER / f"{at['files']:05d}.parquet"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            pq.write_table(pa.Table.from_pylist(group), partial, compression="zstd")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        at = {"files": at["files"] + 1, "rows": at["rows"] + len(group), "stream": rows.state_dict()}
        _write(state, at)
        log.warning("%s: %s rows fetched", source.source, f"{at['rows']:,}")
    if not at["rows"]:
        raise UserError(f"{source.source}: no rows in split {source.split!r}")
    _write(folder / DONE, {"dataset": source.source, "revision": revision, "rows": at["rows"]})


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


def _groups(rows: Any, source: Source, before: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in groups of a file each; where a group begins depends on the rows alone."""
    group: list[dict[str, Any]] = []
    size, left = 0, None if source.limit is None else source.limit - before
    if left is not None and left <= 0:
        return
    for n, row in enumerate(rows, 1):
        group.append({c: row[c] for c in source.columns})
        size += len(str(group[-1]))
        if len(group) >= ROWS or size >= BYTES:
            yield group
            group, size = [], 0
        if n == left:
            break
    if group:
        yield group


def _rows(dataset: Dataset, revision: str | None, source: Source) -> Any:
    """The stream of the columns that are read. Raises `UserError`."""
    datasets = _library(source)
    path = str(Path(dataset.path).expanduser()) if dataset.local else dataset.path
    try:
        rows = datasets.load_dataset(path, dataset.config, split=source.split, revision=revision, streaming=True)
        there = rows.column_names or list(next(iter(rows.take(1)), {}))
    except Exception as e:  # it raises classes of several libraries
        raise _failed(source, e) from None
    for column in source.columns:
        if column not in there:
            from train.data.rows import missing

            raise missing(source.source, column, source, there)
    return rows.select_columns(list(source.columns))


def _library(source: Source) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependency(f"--data {source.source}: needs datasets: pip install 'allotrope[datasets]'") from None
    return datasets


def _failed(source: Source, error: Exception) -> UserError:
    told = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"--data {source.source}: {told}")


def _revision(dataset: Dataset, cache: Path) -> str | None:
    """The commit that the name means now, or meant last where there is no network."""
    if dataset.local:
        return None
    if dataset.revision is not None and re.fullmatch(r"[0-9a-f]{40}", dataset.revision):
        return dataset.revision
    key = hashlib.sha256(repr((dataset.path, dataset.revision)).encode()).hexdigest()[:32]
    note = cache / "revisions" / f"{key}.txt"
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise MissingDependency(
            f"--data hf:{dataset.path}: needs datasets: pip install 'allotrope[datasets]'"
        ) from None
    try:
        found = HfApi().dataset_info(dataset.path, revision=dataset.revision, timeout=20).sha
    except HfHubHTTPError as e:  # there is a network, and no such dataset for us
        told = " ".join(str(e).split())[:300]
        raise UserError(f"--data hf:{dataset.path}: {told}") from None
    except Exception as e:  # no network: the classes of whichever client it uses
        if not note.is_file():
            told = " ".join(str(e).split())[:200]
            raise UserError(
                f"--data hf:{dataset.path}: the Hub can't be reached, and it was not fetched before: {told}"
            ) from None
        return note.read_text(encoding="utf-8")
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(found or "", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{note}: {e.strerror} (try --data.cache FOLDER)") from None
    return found
