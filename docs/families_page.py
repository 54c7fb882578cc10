"""The generated page docs/families.md: each family's representative, and what every target says to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backends
from backends.base import Support
from backends.hf.carriers import KEYS
from convert.families import Family, read
from convert.families.expert_table import UNREAD
from convert.families.table import ROWS

TARGETS = ("torch", "gguf", "mlx", "onnx", "coreml", "tensorrt", "hf")
NAMED = ("gguf", "mlx")
"""Targets whose own architectures carry a spec."""
SIZES = {"width": 256, "depth": 8, "heads": 8, "hidden": 512, "context": 8192}


def page(note: str) -> str:
    """docs/families.md. note: the line that says where it comes from."""
    head = (Path(__file__).parent / "heads" / "families.md").read_text(encoding="utf-8")
    rows = ["| model_type | covers | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 2) + "|"]
    for f in ROWS:
        spec = read(example(f), f.name).spec
        back = {"hf": {"architecture": f.name}}  # as `convert` does without being asked
        cells = [_cell(t, backends.support(t, spec, "f32", **back.get(t, {}))) for t in TARGETS]
        rows.append(f"| `{f.name}` | {f.covers or '-'} | " + " | ".join(cells) + " |")
    return note + head + "\n" + "\n".join([*rows, *_unread()]) + "\n"


def _unread() -> list[str]:
    """The families that are refused with a reason."""
    out = ["", "## What is not read", ""]
    for why in dict.fromkeys(UNREAD.values()):
        names = ", ".join(f"`{n}`" for n, reason in UNREAD.items() if reason == why)
        out.append(f"- {names}: {why}.")
    return out


def example(f: Family) -> dict[str, Any]:
    """A config.json that says sizes and leaves the rest to the family's defaults."""
    row = f.carriers[0]
    keys = {**KEYS, **row.keys}
    sizes = dict(SIZES)
    if row.square or (keys["head_dim"] and f.defaults.get("head_dim") is None):
        sizes["head_dim"] = SIZES["width"] // SIZES["heads"]
    if row.gqa and not row.mqa and f.defaults.get(keys["kv_heads"]) is not None:
        sizes["kv_heads"] = 2
    out: dict[str, Any] = {"model_type": f.name, "vocab_size": 512}
    out |= {keys[n]: v for n, v in sizes.items() if keys[n]}
    if row.mixture is not None:
        m = row.mixture
        out |= {m.experts: 8, m.top_k: 2}
        out |= {key: 128 for key in (m.hidden, m.shared_hidden) if key and key not in out}
        if m.shared_times:
            out[m.shared_hidden] = 1
    return out


def _cell(target: str, verdict: Support) -> str:
    if verdict.ok:
        return f"`{verdict.carrier}`" if target in NAMED else "yes"
    fields = dict.fromkeys(r.split(":", 1)[0].split("]", 1)[-1].removeprefix("block").strip(".") for r in
                           verdict.refusals)  # fmt: skip
    return "no: " + ", ".join(f"`{f}`" for f in fields)
