"""Before the first step: which targets will carry the model, and which of its dimensions would cripple a level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from spec.config import Spec
from spec.errors import UserError
from spec.levels import CODES, GROUPS
from spec.params import Param, params
from spec.show import print_targets

if TYPE_CHECKING:
    from backends.targets import Target

_K = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq1", "iq2", "iq3", "iq4_xs", "tq")

BLOCKS: Sequence[tuple[int, Callable[[str], bool], str]] = (
    (32, lambda level: level in GROUPS, "stays f16 at q8 and q4 on every target"),
    (128, lambda level: CODES.get(level) == 4, "stays f16 at q4-g128, whose groups TensorRT's documents name"),
    (256, lambda level: level.startswith(_K), "falls back to a larger type in llama.cpp's 256-weight levels"),
)
"""Weights in a block, the levels that need it, and what becomes of a matrix whose input width is no multiple."""


def crippled(spec: Spec, levels: Iterable[str]) -> list[str]:
    """One line for each kind of block that some input width is no multiple of: the parameters by name, and the nearest
    widths that are. A width that a smaller block refuses is not named again."""
    levels = tuple(levels)
    matrices = [p for p in params(spec) if p.matrix and p.name != "positions.weight"]
    out: list[str] = []
    named: set[int] = set()
    for block, needs, what in BLOCKS:
        chosen = [level for level in levels if needs(level)]
        bad = {} if not chosen else _by_width(p for p in matrices if p.shape[-1] % block)
        bad = {width: names for width, names in bad.items() if width not in named}
        named |= bad.keys()
        for width, names in bad.items():
            down, up = width // block * block, -(-width // block) * block
            near = f"{down} or {up}" if down else f"{up}"
            out.append(f"{' '.join(names)}: input width {width} is no multiple of {block}, and {what} (try {near})")
    return out


def _by_width(matrices: Iterable[Param]) -> dict[int, list[str]]:
    """Names by input width, layers written as a star."""
    out: dict[int, list[str]] = {}
    for p in matrices:
        first, *rest = p.name.split(".")
        name = ".".join(["layers.*", *rest[1:]] if first == "layers" else [first, *rest]).removesuffix(".weight")
        names = out.setdefault(p.shape[-1], [])
        if name not in names:
            names.append(name)
    return out


def carriers(spec: Spec, levels: Sequence[str]) -> list[Target]:
    """Which backends carry the spec at these levels (at all of them where none is named). Raises `UserError` for a
    level that no backend has."""
    from backends.targets import targets

    try:
        return targets(spec, levels=levels)
    except UserError as e:
        raise UserError(f"ship: {e}") from None


def tell(spec: Spec, source: str, levels: Sequence[str], found: Sequence[Target], console: Console) -> None:
    """Print the table, and a line for each dimension in the way."""
    print_targets(source, found, brief=True, console=console)
    for line in crippled(spec, levels):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
