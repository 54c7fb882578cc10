"""What a level takes as it is, and which one takes several."""

from __future__ import annotations

from itertools import product

import pytest

from spec.levels import GROUPS, LEVELS, fits, joined, takes


def test_stored_bits_count_the_scales() -> None:
    assert {n: LEVELS[n].stored for n in GROUPS} == {"q8": 8.5, "q4": 4.5, "q4-g128": 4.125}


@pytest.mark.parametrize(("width", "whole"), [(128, {"q8", "q4", "q4-g128"}), (96, {"q8", "q4"}), (40, set())])
def test_a_level_fits_rows_of_whole_groups(width: int, whole: set[str]) -> None:
    assert {level for level in GROUPS if fits(level, width)} == whole
    assert fits("f16", width)


def test_codes_go_on_to_as_many_bits_and_to_groups_that_divide_theirs() -> None:
    kept = {(8, 32): {"q8"}, (4, 32): {"q8", "q4"}, (4, 128): {"q8", "q4", "q4-g128"}, (8, 128): {"q8"}, (4, 48): set()}
    for (bits, group), levels in kept.items():
        assert {level for level in LEVELS if takes(level, bits, group)} == levels


def test_the_join_takes_both_and_is_the_smallest() -> None:
    names = {("q4", "q4-g128"): "q4", ("q4", "q8"): "q8", ("q4-g128", "q8"): "q8"}
    for a, b in product(GROUPS, GROUPS):
        assert joined([a, b]) == (a if a == b else names[min(a, b), max(a, b)])
