"""Importance in a conversion to llama.cpp's own types: `--imatrix FILE`, `--imatrix-out FILE`, and what is said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from convert.calibrate.imatrix import CHUNK, export
from convert.calibrated import Calibration
from convert.levels import LEVELS
from convert.prepare import Job, takes_importance
from convert.sources import Source
from convert.sources.base import collapse
from spec.errors import UserError


def check_files(
    asked: Calibration | None, imatrix: str | Path | None, imatrix_out: str | Path | None, force: bool
) -> None:
    """Whether the options go together, before anything is opened. Raises `UserError`."""
    if imatrix is not None and asked is not None:
        raise UserError(
            f"--imatrix {imatrix}: a text is read already (leave --calibrate and --effort out, or --imatrix)"
        )
    if imatrix_out is None:
        return
    out = Path(imatrix_out)
    if asked is None:
        raise UserError(f"--imatrix-out {out}: nothing is measured (give --calibrate stdlib, or a text)")
    if out.suffix != ".gguf":
        raise UserError(f"--imatrix-out {out}: llama.cpp's format ends with .gguf (try {out.with_suffix('.gguf')})")
    if not out.parent.is_dir():
        raise UserError(f"--imatrix-out {out}: no such folder")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--imatrix-out {out}: nothing can be written there (name another folder)")
    if out.exists() and (out.is_dir() or not force):
        raise UserError(f"--imatrix-out {out}: exists (--force replaces a file)")


def check_importance(job: Job, imatrix: str | Path | None, imatrix_out: str | Path | None) -> None:
    """Whether a file tells of every matrix whose type needs it, and has anything to say; and whether one can be
    written. Raises `UserError`."""
    if imatrix_out is not None:
        from backends.gguf.support import support

        refused = support(job.source.spec, "f32").refusals
        if refused:
            raise UserError(f"--imatrix-out {imatrix_out}: llama.cpp does not carry the model: {refused[0]}")
        if Path(imatrix_out).resolve() in [t.path.resolve() for t in job.targets]:
            raise UserError(f"--imatrix-out {imatrix_out}: is the artifact itself")
    found = job.source.importance
    if imatrix is None or found is None:
        return
    own = weighed(job)
    if not own:
        raise UserError(f"--imatrix {imatrix}: llama.cpp's types take importance, and nothing is of one (use --to gguf "
                        "--quant q4_k_m, say, or --calibrate for q4)")  # fmt: skip
    from backends.gguf.recipe import wanting

    blind = [n for n in wanting({p.name: p.level for p in job.planned}, job.level) if found.means(n) is None]
    if blind:
        levels = {p.name: p.level for p in job.planned}
        raise UserError(f"--imatrix {imatrix}: has nothing of {collapse(blind)}, and {levels[blind[0]]} needs it "
                        "(--calibrate stdlib measures it)")  # fmt: skip


def weighed(job: Job) -> list[str]:
    """Matrices that a target rounds by importance, where there is some."""
    if not all(takes_importance(t.backend) for t in job.targets):
        return []
    return [p.name for p in job.planned if p.level not in LEVELS]


def unmeasured(job: Job) -> list[str]:
    """What a user should know: matrices of the layers that nothing is known of, or single experts."""
    found = job.source.importance
    names = [] if found is None else found.unknown(n for n in weighed(job) if n.startswith("layers."))
    if not names:
        return []
    where, how = "not in the importance file", "rounded without"
    if job.source.rounding is not None:
        where, how = "not reached by the calibration text", "rounded without importance"
    return [f"{where}, {how}: {collapse(names)}"]


def metadata(job: Job) -> dict[str, Any]:
    """What llama.cpp's quantizer writes into a model of the importance that it was made with."""
    found, rounding = job.source.importance, job.source.rounding
    names = weighed(job)
    if found is None or not names:
        return {}
    file, chunks = found.record.get("file", ""), found.record.get("chunks", 0)
    dataset = next(iter(found.record.get("datasets", ())), "")
    if rounding is not None:
        dataset, chunks = str(rounding.record.get("text", "")), -(-int(rounding.record.get("tokens", 0)) // CHUNK)
    entries = sum(found.means(n) is not None for n in names)
    told = {"file": file, "dataset": dataset, "entries_count": entries, "chunks_count": chunks}
    return {f"quantize.imatrix.{key}": value for key, value in told.items() if value}


def written(job: Job, out: str | Path) -> str:
    """Write what was measured for llama.cpp; returns what to say of it. Raises `UserError`."""
    assert job.source.rounding is not None, "a calibration"
    entries = export(Path(out), job.source.spec, job.source.rounding)
    return f"importance of {entries} matrices is in {out} (llama-quantize --imatrix and convert --imatrix read it)"


def file_of(source: Source) -> Path | None:
    """The file that importance was read from."""
    return None if source.importance is None else source.importance.path
