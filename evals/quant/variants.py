"""What `--levels` can name, and what each of it is made by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from convert.calibrate.settings import EFFORTS
from convert.levels import LEVELS
from spec.errors import UserError, nearest

OURS = "evals.quant.ours"
DEFAULT = ("q8", "q4", "q4-g128", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q4_0", "mlx-q4", "mlx-lm-4bit-g32", "ort-int4")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    by: str
    """Who made it, the series in the plot."""
    maker: str
    """Module with `make(job, **settings)`."""
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Importable modules."""
    calibrated: bool = False
    """Whether it depends on the calibration text."""

    @property
    def absent(self) -> list[str]:
        """What it needs and is not installed."""
        return [m for m in self.needs if find_spec(m) is None]

    def key(self, state: str) -> str:
        """Name of its result: it changes with everything that the result depends on."""
        data = json.dumps([self.name, self.maker, self.settings, state], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()[:16]


def _peers() -> dict[str, Variant]:
    from evals.quant.llama_cpp import FILE_TYPES

    out: list[Variant] = []
    for t in FILE_TYPES:
        for imatrix in (False, True):
            name = f"llama.cpp-{t}" + ("-imatrix" if imatrix else "")
            by = "llama.cpp's quantizer" + (", imatrix" if imatrix else "")
            settings = {"level": t, "imatrix": imatrix}
            needs = ("llama_cpp", "gguf", *(("torch",) if imatrix else ()))
            out.append(Variant(name, by, "evals.quant.llama_cpp", settings, needs, imatrix))
    for name, settings in {
        "4bit-g32": {"bits": 4, "group": 32},
        "4bit-g64": {"bits": 4, "group": 64},
        "8bit-g64": {"bits": 8, "group": 64},
        **{recipe: {"bits": 4, "group": 64, "recipe": recipe} for recipe in ("mixed_3_6", "mixed_4_6")},
        "dwq-g32": {"bits": 4, "group": 32, "method": "dwq"},
        "dwq-g64": {"bits": 4, "group": 64, "method": "dwq"},
        "gptq-g32": {"bits": 4, "group": 32, "method": "gptq"},
        "gptq-g64": {"bits": 4, "group": 64, "method": "gptq"},
    }.items():
        method = "method" in settings
        by = f"mlx-lm {settings['method'].upper()}" if method else "mlx-lm convert"
        out.append(Variant(f"mlx-lm-{name}", by, "evals.quant.mlx_lm", settings, ("mlx", "mlx_lm"), method))
    for name, settings in {
        "int4": {"method": "default", "group": 32},
        "int4-g128": {"method": "default", "group": 128},
        "int4-sym": {"method": "default", "group": 32, "symmetric": True},
        "rtn": {"method": "rtn", "group": 32},
        "k_quant": {"method": "k_quant", "group": 32},
        "hqq": {"method": "hqq", "group": 32},
        "hqq-g64": {"method": "hqq", "group": 64},
        "gptq": {"method": "gptq", "group": 32},
    }.items():
        needs = ("onnx", "onnx_ir", "onnxruntime", *(("torch",) if settings["method"] in ("hqq", "gptq") else ()))
        by = f"onnxruntime {settings['method'].replace('default', 'int4')}"
        calibrated = settings["method"] == "gptq"
        out.append(Variant(f"ort-{name}", by, "evals.quant.onnxruntime", settings, needs, calibrated))
    for name, group in (("int4", 32), ("int4-g128", 128)):
        settings = {"group": group}
        out.append(Variant(f"torchao-{name}", "torchao", "evals.quant.torchao", settings, ("torch", "torchao")))
    return {v.name: v for v in out}


PEERS = _peers()
"""Other tools' own quantizers."""
NATIVE = {"gguf": ("gguf", "llama_cpp"), "mlx": ("mlx",)}
"""Containers whose own types are asked for by name alone, and what writing them needs."""


def known() -> list[str]:
    """Every name."""
    import backends

    own = [x for b in NATIVE for x in backends.part(backends.get(b), "support").levels() if x not in LEVELS]
    return list(dict.fromkeys([*LEVELS, *own, *PEERS]))


def parse(levels: Sequence[str], efforts: Sequence[str]) -> list[Variant]:
    """Variants in the order in which they were asked for. Raises `UserError` for unknown names."""
    for effort in efforts:
        if effort not in EFFORTS:
            raise UserError(f"--effort {effort}: no such effort ({nearest(effort, EFFORTS)})")
    out: dict[str, Variant] = {}
    for name in levels:
        for v in _named(name.lower(), efforts):
            out[v.name] = v
    if not out:
        raise UserError("--levels: names none (for example --levels q8,q4,q4_k_m)")
    return list(out.values())


def _named(name: str, efforts: Sequence[str]) -> list[Variant]:
    """What one name stands for: a level of ours at every effort, a native type without and with importance."""
    import backends

    if name in PEERS:
        return [PEERS[name]]
    if name in LEVELS:
        coded = LEVELS[name].group is not None
        return [_ours(name, e, coded) for e in (EFFORTS if coded else ("fast",)) if e in efforts or not coded]
    for b, needs in NATIVE.items():
        if name in backends.part(backends.get(b), "support").levels():
            kinds = ("fast", "good") if b == "gguf" and set(efforts) - {"fast"} else ("fast",)
            return [_native(name, b, e, needs) for e in kinds]
    raise UserError(f"--levels {name}: no such level ({nearest(name, known())})")


def _ours(level: str, effort: str, coded: bool) -> Variant:
    settings = {"target": "", "level": level, "effort": effort}
    name = level if effort == "fast" else f"{level}-{effort}"
    by = f"allotrope, {effort}" if coded else "allotrope, floats"
    needs = () if effort == "fast" else ("torch",)
    return Variant(name, by, OURS, settings, needs, effort != "fast")


def _native(level: str, target: str, effort: str, needs: tuple[str, ...]) -> Variant:
    settings = {"target": target, "level": level, "effort": effort}
    with_importance = effort != "fast"
    name = f"{level}-importance" if with_importance else level
    by = {"gguf": "llama.cpp's types", "mlx": "MLX's types"}[target] + (", importance" if with_importance else "")
    extra = ("torch",) if with_importance else ()
    return Variant(name, by, OURS, settings, (*needs, *extra), with_importance)
