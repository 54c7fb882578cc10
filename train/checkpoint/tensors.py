"""Tensors by name in a folder of torch.distributed.checkpoint (DCP): every rank writes what it has, and any other
number of ranks, sharded in any other way, reads it back."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from spec.errors import UserError


def quiet() -> None:
    """DCP warns wherever there is one process. Call it from the main thread: filters are the whole process's."""
    warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the cause on the first rank that failed."""
    while True:
        if isinstance(error, CheckpointException) and error.failures:
            error = error.failures[min(error.failures)][0]
        elif not isinstance(error, OSError | UserError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch's zip writer hides what the disk said
        else:
            break
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


class Stager:
    """Copies of tensors in the CPU's memory, which training no longer changes."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = DefaultStager(StagingOptions(True, False, False, True)) if device.type == "cuda" else None

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies. On CUDA they lie in page-locked memory that the next call reuses."""
        if self._pinned is not None:
            return self._pinned.stage(dict(tensors))  # type: ignore[return-value]
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged: Any = stager.stage(dict(tensors))
        stager.close()  # it would keep the copies for the next time
        return staged


class _Writer(FileSystemWriter):
    """Errors in words: what torch's zip writer says of a full disk means nothing, and the cause is lost on the way to
    the other ranks."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except (OSError, RuntimeError) as e:
            raise UserError(reason(e)) from None

    def finish(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().finish(*args, **kwargs)
        except OSError as e:
            raise UserError(reason(e)) from None


def save(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> None:
    """Write each tensor, or this rank's shard of it, to files that are on the disk when this returns.

    group: of all ranks; none for a single process. A tensor that several ranks have whole is written once. Raises
    `CheckpointException` on every rank where one fails.
    """
    state_dict_saver.save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=group is None)


class _Records(pickle.Unpickler):
    """DCP's metadata is a pickle: it may name DCP's own records, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = super().find_class(module, name) if module in _PICKLED else None
        if module == "torch" and not (found is torch.Size or isinstance(found, torch.dtype | torch.layout)):
            found = None
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")
        return found


_PICKLED = ("torch", "torch.serialization", "torch.distributed.checkpoint.metadata",
            "torch.distributed.checkpoint.filesystem", "collections", "pathlib", "pathlib._local")  # fmt: skip


class Reader(FileSystemReader):
    """A DCP folder whose metadata is read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as f:
            self._metadata: Metadata = _Records(f).load()
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is."""
        return self._metadata

    @property
    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype by name."""
        found = self._metadata.state_dict_metadata
        return {n: (m.size, m.properties.dtype) for n, m in found.items() if isinstance(m, TensorStorageMetadata)}

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        found: Any = self._metadata.state_dict_metadata[name]
        return found.properties.dtype

    def load(self, into: Mapping[str, Tensor], group: Any = None) -> None:
        """Fill these tensors in place; of distributed ones, this rank's shards. All ranks of `group` must take part.

        Raises `CheckpointException` where something is missing, has another shape or is damaged.
        """
        state_dict_loader.load(dict(into), storage_reader=self, process_group=group, no_dist=group is None)


__all__ = ["CheckpointException", "Reader", "Stager", "quiet", "reason", "save"]
