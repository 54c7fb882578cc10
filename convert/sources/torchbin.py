"""pytorch_model.bin: names, shapes and places by `torch.load(weights_only=True)` alone, then positioned reads.

The file is a ZIP archive: a pickle that describes the tensors, and each storage as a member, not compressed. torch's
restricted unpickler refuses everything but tensors and plain containers; with `map_location="meta"` it allocates and
reads none of the weights and says where each storage lies. That is held against the archive's own directory.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from convert.sources.store import FLOATS, WIDTHS, Placed
from spec.errors import MissingDependency, UserError

WEIGHTS = "pytorch_model.bin"
NEEDS = (2, 13)
"""Of torch. Before 2.6 its restricted unpickler could be made to run code (CVE-2025-32434)."""
MAX_DIRECTORY = MAX_PICKLE = 64_000_000
"""Bytes: about half a million tensors."""
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


def read(fd: int, path: Path, file: int) -> dict[str, Placed]:
    """The tensors of a file, none of whose weights are read and nothing of which is run. Raises `UserError`."""
    members = _members(fd, path)
    state = _load(path)
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds {type(state).__name__}, not tensors by name (save model.state_dict())")
    import torch

    other = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if other:
        shown = ", ".join(f"{str(k)[:40]!r}" for k in other[:8]) + (" ..." if len(other) > 8 else "")
        raise UserError(f"{path}: {len(other)} of its entries are no tensors: {shown} (save model.state_dict() alone)")
    return {name: _placed(path, name, t, members, file) for name, t in state.items()}


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise MissingDependency(f"{path}: a .bin file is read with torch: pip install 'allotrope[train]' "
                                "(or save it as safetensors)") from None  # fmt: skip
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) < NEEDS:
        raise MissingDependency(f"{path}: a .bin file is read with torch {NEEDS[0]}.{NEEDS[1]} or later, "
                                f"here is {torch.__version__}: pip install -U torch")  # fmt: skip
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except Exception as e:  # whatever a malformed pickle does to the unpickler
        text = " ".join(str(e).split())
        asked = re.search(r"GLOBAL ([\w.]+)", text)
        if asked:
            raise UserError(f"{path}: refused: its pickle asks for {asked[1][:80]}, and weights need no code "
                            "(nothing of it was run)") from None  # fmt: skip
        raise UserError(f"{path}: torch cannot read it: {text[:160] or type(e).__name__}") from None


def _placed(path: Path, name: str, tensor: Any, members: Mapping[int, int], file: int) -> Placed:
    dtype, shape = DTYPES.get(str(tensor.dtype)), tuple(tensor.shape)
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        raise UserError(f"{path}: {name[:200]} is {tensor.dtype}, {tensor.layout}; floats in rows are read")
    if not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
        raise UserError(f"{path}: {name[:200]} is a view with strides {tuple(tensor.stride())} of another tensor "
                        "(save it .contiguous(), or as safetensors)")  # fmt: skip
    size, skip = prod(shape) * WIDTHS[dtype], tensor.storage_offset() * WIDTHS[dtype]
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    if size and not (skip >= 0 and skip + size <= members.get(start, -1)):
        raise UserError(f"{path}: {name[:200]} does not lie where the archive's directory has its bytes; copy it again")
    return Placed(dtype, shape, dtype in FLOATS, file, start + skip)


def _members(fd: int, path: Path) -> dict[int, int]:
    """Place and size of the data of every member. Raises `UserError` where one is compressed or not whole."""
    size = os.fstat(fd).st_size
    if os.pread(fd, 4, 0) != b"PK\x03\x04":
        if os.pread(fd, 2, 0) in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise UserError(f"{path}: torch's format from before 1.6; write it again with python -c \"import torch; "
                            f"p = '{path.name}'; torch.save(torch.load(p, weights_only=True), p)\"")  # fmt: skip
        raise UserError(f"{path}: no file of torch.save")
    if _directory(fd, size) > MAX_DIRECTORY:
        raise UserError(f"{path}: the archive's directory is not sound")
    try:
        with os.fdopen(os.dup(fd), "rb") as f, zipfile.ZipFile(f) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as e:
        raise UserError(f"{path}: truncated or no file of torch.save ({e}); copy it again") from None
    if len({i.filename for i in infos}) < len(infos):
        raise UserError(f"{path}: the archive has two members of one name")
    out: dict[int, int] = {}
    for i in infos:
        if i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1 or i.compress_size != i.file_size:
            raise UserError(f"{path}: the archive's {i.filename[:80]} is compressed, which torch.save never does")
        if i.filename.endswith("/data.pkl") and i.file_size > MAX_PICKLE:
            raise UserError(f"{path}: the archive's {i.filename[:80]} has {i.file_size:,} bytes, too many for names")
        if i.filename.endswith("/byteorder") and os.pread(fd, min(i.file_size, 16), _data(fd, i)) != b"little":
            raise UserError(f"{path}: written on a big-endian machine; save it as safetensors there")
        start = _data(fd, i)
        if start + i.file_size > size:
            raise UserError(f"{path}: truncated: {i.filename[:80]} ends beyond the file; copy it again")
        out[start] = i.file_size
    return out


def _data(fd: int, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header has 30 bytes, its name and a padding of its own length."""
    local = os.pread(fd, 30, info.header_offset)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        return 1 << 63  # beyond every file
    name, extra = struct.unpack("<HH", local[26:30])
    return info.header_offset + 30 + name + extra


def _directory(fd: int, size: int) -> int:
    """Bytes of the central directory, as the end record says (the ZIP format's APPNOTE, 4.3.14 to 4.3.16)."""
    start = max(0, size - (1 << 16))
    tail = os.pread(fd, size - start, start)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        return 0  # zipfile says what is wrong
    (length,) = struct.unpack("<I", tail[end + 12 : end + 16])
    locator = tail[end - 20 : end] if end >= 20 else b""
    if locator[:4] == b"PK\x06\x07":
        (at,) = struct.unpack("<Q", locator[8:16])
        record = os.pread(fd, 56, at) if at < size else b""
        length = struct.unpack("<Q", record[40:48])[0] if len(record) == 56 else size
    return length
