"""The artifact's place on disk: one conversion at a time, a partial name until it is whole, the old file safe."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

from backends.base import Backend
from backends.folder import read_mark
from spec.errors import UserError

PARTIAL = ".partial"
REPLACED = ".replaced"


def receipt_beside(out: Path) -> Path:
    """The sidecar of an artifact with a suffix: the receipt with the whole report."""
    return out.with_name(out.name + ".receipt.json")


def check(out: Path, backend: Backend, force: bool) -> None:
    """Whether `out` may be written; artifacts keep their suffix, so that no other file is taken for one, and a folder
    is only ever replaced where a conversion made it. Raises `UserError`."""
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: is no name for an artifact; write one, as in {out / ('model' + backend.suffix)}")
    if out.is_dir() and not backend.folder:
        raise UserError(f"--out {out}: is a folder; name the file")
    if backend.suffix and out.suffix != backend.suffix:
        raise UserError(f"--out {out}: must end with {backend.suffix}")
    if out.is_symlink() and (backend.folder or not out.exists()):
        raise UserError(f"--out {out}: is a symbolic link; name the place that it leads to")
    if out.exists() and not force:
        raise UserError(f"--out {out}: exists; --force replaces it once the new one is whole and verified")
    if out.exists() and backend.folder and not replaceable(out, backend):
        raise UserError(f"--out {out}: is no {backend.name} artifact of ours, so it is not replaced; name another")
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {parent} is not writable")


def replaceable(out: Path, backend: Backend) -> bool:
    """Whether a folder may be replaced: it is empty, or has the mark or the sidecar of the same backend's artifact."""
    if not out.is_dir():
        return False
    ours = receipt_beside(out).is_file() if backend.suffix else read_mark(out).get("backend") == backend.name
    return ours or not any(out.iterdir())


def check_space(out: Path, need: int) -> None:
    """Whether `need` bytes are free where `out` goes. Raises `UserError`."""
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    stale = partial(out)
    with suppress(OSError):  # what a killed conversion left behind is overwritten
        free += sum(f.lstat().st_blocks * 512 for f in (stale, *stale.rglob("*")))
    if need > free:
        raise UserError(f"--out {out}: needs {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on its disk")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


_NO_WEIGHTS = frozenset({".json", ".jinja", ".md", ".model", ".py", ".txt", ".yaml"})


def weight_bits(path: Path, backend: str, weights: int) -> float:
    """Bits on disk for each weight of the model; names, metadata and tokenizer are left out where the format tells."""
    if backend == "gguf":
        from backends.gguf.container import read_header
        from backends.gguf.types import TYPES

        tensors = read_header(path).tensors.values()
        return 8 * sum(TYPES[t.type].nbytes(prod(t.shape)) for t in tensors) / weights
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file() and f.suffix not in _NO_WEIGHTS]
    return 8 * sum(f.stat().st_size for f in files) / weights


def partial(out: Path) -> Path:
    """Where an artifact grows."""
    return out.with_name(out.name + PARTIAL)


@contextmanager
def reserved(out: Path, *beside: Path) -> Iterator[Path]:
    """The partial path of `out`, for this process alone. What still has a partial name at the end, of `out` or of the
    files `beside` it, is deleted, and so are folders that were made for it and are empty.

    Raises `UserError` where another conversion writes the same output.
    """
    lock = out.with_name(out.name + ".lock")
    absent = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    try:
        fd = _locked(out, lock)
        path = partial(out)
        try:
            _restore(out)  # a conversion was killed between the two renames of `publish`
            _remove(path)
            yield path
        finally:
            _remove(path)
            _restore(out)
            for left in (*map(partial, beside), lock):
                with suppress(OSError):
                    left.unlink(missing_ok=True)
            os.close(fd)
    finally:
        with suppress(OSError):  # folders that were made for it, where nothing came into them
            for made in absent:
                made.rmdir()


def _restore(out: Path) -> None:
    """What stepped aside for a new folder comes back, or goes where the new one is in its place."""
    aside = out.with_name(out.name + REPLACED)
    with suppress(OSError):
        if aside.exists():
            _remove(aside) if out.exists() else aside.rename(out)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _locked(out: Path, lock: Path) -> int:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise UserError(f"--out {out}: another conversion is writing it") from None
            # whoever held it before may have deleted the file between open and flock
            with suppress(FileNotFoundError):
                if lock.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None


def publish(path: Path, out: Path) -> None:
    """Give a whole file or folder its name, durably. Raises `UserError`."""
    try:
        if path.is_dir():
            _publish_folder(path, out)
        else:
            path.replace(out)
        _sync(out.parent)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None


def _publish_folder(path: Path, out: Path) -> None:
    """A folder cannot replace another in one step: the old one steps aside, and comes back if anything goes wrong."""
    for f in (path, *path.rglob("*")):
        _sync(f)
    if out.exists():
        out.rename(out.with_name(out.name + REPLACED))
    try:
        path.rename(out)
    finally:
        _restore(out)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def staged(out: Path, text: str) -> Path:
    """A small file beside the artifact, whole under its partial name; `publish` names it. Raises `UserError`."""
    path = partial(out)
    try:
        with path.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:  # `reserved` deletes what there is of it
        raise UserError(f"{out}: {e.strerror}") from None
    return path
