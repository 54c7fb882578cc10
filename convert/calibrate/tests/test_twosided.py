"""Compensation from row to row: less of what the answers feel, still on the grid, whatever the outputs' moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate.compensate import compensate, prepare
from convert.calibrate.twosided import compensate_both
from convert.quantize import GRIDS, TooLarge, round_scale


def moment(width: int, seed: int, tokens: int = 600) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)
    x = x * torch.linspace(2, 0.1, width) + 2 * torch.randn(tokens, 1, generator=g)
    return x.T @ x / tokens


def weights() -> Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 0.03


def cost(weight: Tensor, q: QuantizedTensor, h: Tensor, g: Tensor) -> float:
    e = weight.double() - torch.from_numpy(q.dequantize()).double()
    return float(((g.double() @ e @ h.double()) * e).sum())


def test_errors_of_rows_are_made_up_for_by_later_rows() -> None:
    w, h, g = weights(), moment(128, 2), moment(64, 3)
    f = prepare(h)
    one, both = compensate(w, f, "q4"), compensate_both(w, f, g, "q4", 16)
    assert cost(w, both, h, g) < 0.7 * cost(w, one, h, g)
    again = compensate_both(w, f, g, "q4", 16)
    assert np.array_equal(both.codes, again.codes) and np.array_equal(both.scales, again.scales)


def test_rows_whose_gradients_have_nothing_in_common_are_rounded_as_alone() -> None:
    w, f = weights(), prepare(moment(128, 2))
    one, both = compensate(w, f, "q4"), compensate_both(w, f, torch.eye(64), "q4", 64)
    assert np.array_equal(one.codes, both.codes) and np.array_equal(one.scales, both.scales)


HOSTILE = {
    "all zero": lambda g: g * 0,
    "one direction": lambda g: torch.outer(g[0], g[0]),
    "not a number": lambda g: g * float("nan"),
    "huge": lambda g: g * 1e25,
    "an outlier": lambda g: g + torch.diag(torch.eye(64)[7]) * 1e9,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_moments_of_the_outputs_give_codes_on_the_grid(kind: str) -> None:
    w, h = weights(), moment(128, 2)
    w[2], w[3, 5] = 0, 300.0
    q = compensate_both(w, prepare(h, h), HOSTILE[kind](moment(64, 3)), "q4", 16)
    assert q.codes.min() >= -8 and q.codes.max() <= 7
    assert np.isfinite(q.scales).all() and (q.scales > 0).all() and (q.scales <= GRIDS[4].largest).all()
    assert np.array_equal(round_scale(q.scales), q.scales)


def test_what_no_scale_holds_is_refused_by_its_own_row() -> None:
    w = weights()
    w[41, 3] = 1e30
    with pytest.raises(TooLarge, match="row 41"):
        compensate_both(w, prepare(moment(128, 2)), moment(64, 3), "q4", 16)
