"""Compensated rounding: on the grid, never worse than the search, the same each time, whatever the Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate import compensate as c
from convert.calibrate.kinds import Kinds, Sums, by_context, by_frequency
from convert.calibrate.sensitivity import cost, row_cost
from convert.calibrate.vocabulary import Vocabulary
from convert.levels import CODES, GROUPS
from convert.quantize import GRIDS, TooLarge, quantize, round_scale

LEVELS = ("q4", "q8", "q4-g128")


def inputs(tokens: int = 600, width: int = 256, seed: int = 0) -> Tensor:
    """Correlated rows of very different size, as a decoder's are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / width**0.5 * torch.linspace(3, 0.02, width)[:, None]
    return torch.randn(tokens, width, generator=g) @ mix


def weights(rows: int = 48, width: int = 256, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.03


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def objective(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> float:
    error = weight.double() - torch.from_numpy(q.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


def searched(weight: Tensor, hessian: Tensor, level: str) -> QuantizedTensor:
    return quantize(weight.numpy(), CODES[level], GROUPS[level], hessian.diagonal().clamp_min(1e-12).numpy())


def on_grid(q: QuantizedTensor, level: str) -> None:
    grid = GRIDS[CODES[level]]
    assert (q.bits, q.group) == (CODES[level], GROUPS[level])
    assert q.codes.min() >= grid.low and q.codes.max() <= grid.high
    assert np.isfinite(q.scales).all() and (q.scales > 0).all() and (q.scales <= grid.largest).all()
    assert np.array_equal(round_scale(q.scales), q.scales)


@pytest.mark.parametrize("level", LEVELS)
def test_compensation_costs_far_less_than_the_search_and_stays_on_the_grid(level: str) -> None:
    h, w = moment(inputs()), weights()
    q = c.compensate(w, c.prepare(h), level)
    on_grid(q, level)
    assert objective(w, q, h) < 0.5 * objective(w, searched(w, h, level), h)


@pytest.mark.parametrize("level", LEVELS)
def test_polishing_never_raises_the_cost(level: str) -> None:
    h, w = moment(inputs(seed=3)), weights()
    f = c.prepare(h)
    costs = [objective(w, c.compensate(w, f, level, sweeps=n), f.hessian) for n in (0, 1, 2, 5)]
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < costs[0]


def test_without_correlations_it_is_the_search() -> None:
    w = weights()
    q, plain = c.compensate(w, c.prepare(torch.eye(256)), "q4", sweeps=0), quantize(w.numpy(), 4)
    assert np.array_equal(q.codes, plain.codes) and np.array_equal(q.scales, plain.scales)


def test_a_weight_on_the_grid_stays_what_it_is() -> None:
    q = quantize(weights().numpy(), 4)
    again = c.compensate(torch.from_numpy(q.dequantize()), c.prepare(moment(inputs())), "q4")
    assert np.array_equal(again.dequantize(), q.dequantize())


def test_rows_do_not_depend_on_one_another_and_twice_is_the_same() -> None:
    f, w = c.prepare(moment(inputs())), weights()
    whole, again, part = (c.compensate(x, f, "q4") for x in (w, w, w[8:24]))
    assert np.array_equal(whole.codes, again.codes) and np.array_equal(whole.scales, again.scales)
    assert objective(w[8:24], part, f.hessian) == pytest.approx(objective(w[8:24], whole[8:24], f.hessian), rel=1e-3)


def test_the_cross_moment_makes_up_for_inputs_that_are_off() -> None:
    plain = inputs(2000)
    mixing = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)) * 0.01
    x, w = plain + plain @ mixing, weights()
    with_cross = c.compensate(w, c.prepare(moment(x), plain.T @ x / len(x)), "q8")
    without = c.compensate(w, c.prepare(moment(x)), "q8")

    def off(q: QuantizedTensor) -> float:
        return float((plain @ w.T - x @ torch.from_numpy(q.dequantize()).T).square().sum())

    assert off(with_cross) < 0.2 * off(without)


HOSTILE = {
    "all zero": lambda h: torch.zeros_like(h),
    "one token": lambda h: torch.outer(h[0], h[0]),
    "dead columns": lambda h: h * (torch.arange(len(h)) % 3 > 0) * (torch.arange(len(h)) % 3 > 0)[:, None],
    "tiny": lambda h: h * 1e-30,
    "huge": lambda h: h * 1e25,
    "indefinite by rounding": lambda h: torch.outer(h[0], h[0]) - 1e-3 * torch.eye(len(h)) * h[0].square().mean(),
    "an outlier": lambda h: h + torch.diag(torch.eye(len(h))[7]) * 1e9,
    "not a number": lambda h: h * float("nan"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_hessian_gives_codes_on_the_grid(kind: str) -> None:
    h, w = HOSTILE[kind](moment(inputs(50))), weights(16)
    w[2], w[3], w[4, 5] = 0, 0.7, 300.0
    w[5, 32:64] = 1e-30
    q = c.compensate(w, c.prepare(h, h), "q4")
    on_grid(q, "q4")
    assert not q.codes[2].any()
    assert abs(q.dequantize() - w.numpy())[3].max() < 0.2


def test_what_no_scale_holds_is_refused() -> None:
    w = weights(4)
    w[1, 3] = 1e30
    with pytest.raises(TooLarge):
        c.compensate(w, c.prepare(moment(inputs())), "q4")


@pytest.mark.parametrize("value", [2.0**-30, 2.0**-24, 3 * 2.0**-24, 2.0**-18, 1.5e-5, 0.1234, 500.0])
def test_scales_are_rounded_as_the_search_rounds_them(value: float) -> None:
    s = np.array([value, value * 1.003], np.float32)
    assert np.array_equal(c.round_scales(torch.from_numpy(s), 8160.0).numpy(), round_scale(s))


def kinds(hessians: list[Tensor], uses: Tensor) -> Kinds:
    return Kinds(torch.arange(len(uses)) % len(hessians), torch.stack(hessians), uses)


def test_an_embedding_is_rounded_for_both_its_uses() -> None:
    w = weights(96)
    looked_up = kinds([moment(inputs(seed=7))], (torch.arange(96).float() / 96) ** 2)
    answers = kinds([moment(inputs(seed=s)) for s in (8, 9)], torch.full((96,), 0.3))
    both = Vocabulary([looked_up, answers])

    def costs(q: QuantizedTensor) -> float:
        error = w - torch.from_numpy(q.dequantize())
        second = [row_cost(error[n::2], [(answers.hessians[n], answers.uses[n::2])]) for n in (0, 1)]
        return row_cost(error, [(looked_up.hessians[0], looked_up.uses)]) + sum(second)

    tied = both(w, "q4")
    on_grid(tied, "q4")
    assert costs(tied) < min(costs(Vocabulary([use])(w, "q4")) for use in (looked_up, answers))
    assert costs(tied) < 0.6 * costs(quantize(w.numpy(), 4))
    assert both.costs(w, ("q4", "q8"))[0] == pytest.approx(costs(tied), rel=1e-4)


def test_each_kind_of_rows_is_rounded_for_its_own_hessian() -> None:
    w, use = weights(40), kinds([moment(inputs(seed=s)) for s in (8, 9)], torch.ones(40))
    q = Vocabulary([use])(w, "q4")
    for n in (0, 1):
        alone = c.compensate(w[n::2], c.prepare(use.hessians[n]), "q4")
        assert np.array_equal(q.codes[n::2], alone.codes) and np.array_equal(q.scales[n::2], alone.scales)
    w[23, 5] = 1e30
    with pytest.raises(TooLarge, match="row 23"):
        Vocabulary([use])(w, "q4")


def test_rows_of_a_head_share_a_hessian_where_their_contexts_are_alike() -> None:
    g = torch.Generator().manual_seed(3)
    directions, rows = torch.randn(3, 16, generator=g), torch.arange(60) % 3
    labels = by_context(directions[rows] + 0.1 * torch.randn(60, 16, generator=g), torch.ones(60), 6)
    for n in range(3):
        others = labels[rows != n]
        assert not set(labels[rows == n].tolist()) & set(others.tolist())


def test_frequent_tokens_have_a_fisher_information_of_their_own() -> None:
    counts = torch.tensor([5, 900, 0, 400, 7])
    labels = by_frequency(counts, 3)
    assert labels.tolist() == [0, 1, 0, 2, 0]
    sums, rows = Sums(labels, 4), torch.ones(1000, 4)
    sums.looked_up(torch.full((1000,), 1), rows * 3)
    sums.looked_up(torch.full((1000,), 0), rows)
    found = sums.lookup_kinds(counts)
    assert found.hessians[1, 0, 0] == pytest.approx((9 * 1000 + 256 * 5) / 1256)
    assert found.hessians[2, 0, 0] == pytest.approx(5.0)  # it never came: what holds for all


def test_a_token_that_never_came_is_rounded_too() -> None:
    w, nothing = weights(4), torch.zeros(4)
    uses = [kinds([moment(inputs(seed=s))], nothing) for s in (1, 2)]
    assert np.abs(Vocabulary(uses)(w, "q4").dequantize() - w.numpy()).max() < 0.05


def test_the_cost_is_that_of_the_error_and_less_at_more_bits() -> None:
    h, w = moment(inputs()), weights()
    f, squares = c.prepare(h), torch.linspace(0.1, 2, len(w))
    q = c.compensate(w, f, "q4", sweeps=1)
    error = w - torch.from_numpy(q.dequantize())
    expected = 0.5 * float((squares[:, None] * error @ h * error).sum())
    assert cost(w, "q4", f, h, squares) == pytest.approx(expected, rel=1e-4)
    assert 0 < cost(w, "q8", f, h, squares) < 0.01 * expected
