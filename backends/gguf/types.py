"""ggml's storage types as plain data, and the levels a GGUF can be written at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """`block` weights take `size` bytes."""

    name: str
    id: int
    block: int
    size: int
    importance: bool = False
    """Whether ggml refuses (or llama.cpp advises against) quantizing to it without an importance matrix."""

    def nbytes(self, elements: int) -> int:
        """Bytes of whole rows with so many weights in all."""
        return elements // self.block * self.size


TYPES = {
    t.name: t
    for t in (
        GgmlType("f32", 0, 1, 4),
        GgmlType("f16", 1, 1, 2),
        GgmlType("bf16", 30, 1, 2),
        GgmlType("q4_0", 2, 32, 18),
        GgmlType("q4_1", 3, 32, 20),
        GgmlType("q5_0", 6, 32, 22),
        GgmlType("q5_1", 7, 32, 24),
        GgmlType("q8_0", 8, 32, 34),
        GgmlType("q2_k", 10, 256, 84),
        GgmlType("q3_k", 11, 256, 110),
        GgmlType("q4_k", 12, 256, 144),
        GgmlType("q5_k", 13, 256, 176),
        GgmlType("q6_k", 14, 256, 210),
        GgmlType("iq2_xxs", 16, 256, 66, importance=True),
        GgmlType("iq2_xs", 17, 256, 74, importance=True),
        GgmlType("iq3_xxs", 18, 256, 98, importance=True),
        GgmlType("iq1_s", 19, 256, 50, importance=True),
        GgmlType("iq4_nl", 20, 32, 18),
        GgmlType("iq3_s", 21, 256, 110),
        GgmlType("iq2_s", 22, 256, 82, importance=True),
        GgmlType("iq4_xs", 23, 256, 136),
        GgmlType("iq1_m", 29, 256, 56, importance=True),
        GgmlType("tq1_0", 34, 256, 54),
        GgmlType("tq2_0", 35, 256, 66),
        GgmlType("mxfp4", 39, 32, 17),
    )
}
"""By lower-case name, as llama.cpp prints them."""

BY_ID = {t.id: t for t in TYPES.values()}

PORTABLE = {"f32": "f32", "bf16": "bf16", "f16": "f16", "q8": "q8_0", "q4": "q4_0", "q4-g128": "q4_0"}
"""The portable levels and the containers that hold them exactly: Q4_0 says a scale for 128 weights four times."""

_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""llama.cpp's own choice where a row is no whole number of 256-blocks."""


def fitting(name: str, width: int) -> str:
    """The type that a row of `width` weights can have: `name`, llama.cpp's fallback for it, or f16."""
    if width % TYPES[name].block == 0:
        return name
    other = _FALLBACK.get(name, name)
    return other if width % TYPES[other].block == 0 else "f16"


def container(level: str) -> str:
    """The ggml type of a planned level: portable names become what holds them."""
    return PORTABLE.get(level, level)


_EXACT = ("q4_0", "q8_0", "f32")
"""Each holds every value of the ones before it, for portable codes and scales."""


def joined(levels: list[str]) -> str:
    """One ggml type for tensors that the file stores as one: theirs, or the smallest that holds all of them exactly."""
    names = {container(x) for x in levels}
    if len(names) == 1:
        return names.pop()
    if names <= set(_EXACT):
        return max(names, key=_EXACT.index)
    return "f32"
