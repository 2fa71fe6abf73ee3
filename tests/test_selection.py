"""Which learning rate wins, and when the grid was too short."""

from __future__ import annotations

import pytest

from rankwise.selection import HIGHEST, LOWEST, at_edge, choose, extension, half_decade

GRID = [3e-4, 1e-3, 3e-3, 1e-2]


def curve(*losses: float | list[float | None] | None) -> dict[float, list[float | None]]:
    return {r: v if isinstance(v, list) else [v, v] for r, v in zip(GRID, losses, strict=False)}


def test_the_lowest_mean_wins():
    assert choose(curve(2.0, [1.0, 1.9], [1.4, 1.4], 1.6)) == 3e-3  # not the luckiest single seed
    assert choose(curve(2.0, [1.0, 1.7], [1.4, 1.4], 1.6)) == 1e-3


def test_a_tie_goes_to_the_lower_rate_whatever_the_order():
    tied = curve(2.0, 1.5, 1.5, 2.0)
    assert choose(tied) == choose(dict(reversed(tied.items()))) == 1e-3


def test_one_diverged_seed_makes_a_rate_ineligible():
    assert choose(curve(2.0, 1.8, [0.1, None], None)) == 1e-3
    assert choose(curve(None, None, [None, 1.0], None)) is None
    assert choose(curve(2.0, [], 2.1, 2.2)) == 3e-4, "a rate without losses cannot win"


@pytest.mark.parametrize(
    ("losses", "added"),
    [
        ((2.0, 1.5, 1.6, 1.9), None),
        ((2.0, 1.9, 1.8, 1.7), 3e-2),
        ((1.5, 1.6, 1.7, 1.8), 1e-4),
        ((2.0, 1.9, 1.8, None), None),  # the far side was seen: it diverges
        ((None, 1.9, 2.0, 2.1), None),
        ((None, None, None, None), None),
        ((1.5, None, None, None), 1e-4),
        ((None, None, None, 1.5), 3e-2),
    ],
)
def test_a_winner_at_the_edge_extends_the_grid(losses, added):
    assert extension(curve(*losses)) == added
    assert at_edge(curve(*losses)) == (added is not None)


def test_one_rate_is_no_grid():
    assert extension({1e-3: [1.0]}) is None and not at_edge({1e-3: [1.0]}) and choose({1e-3: [1.0]}) == 1e-3


def test_the_grid_ends_somewhere():
    top, bottom = {0.3: [1.2], HIGHEST: [1.0]}, {LOWEST: [1.0], 1e-5: [1.2]}
    for losses in (top, bottom):
        assert extension(losses) is None and at_edge(losses)
    assert extension({0.1: [1.2], 0.3: [1.0]}) == HIGHEST
    assert extension({3e-6: [1.0], 1e-5: [1.2]}) == LOWEST


@pytest.mark.parametrize(
    ("rate", "above", "below"),
    [(1e-3, 3e-3, 3e-4), (3e-3, 1e-2, 1e-3), (2e-4, 3e-4, 1e-4), (5e-3, 1e-2, 3e-3), (0.3, 1.0, 0.1),
     (9.9e-4, 3e-3, 3e-4), (1e-6, 3e-6, 3e-7)],
)  # fmt: skip
def test_half_decades(rate: float, above: float, below: float):
    assert half_decade(rate, +1) == above and half_decade(rate, -1) == below


def test_steps_up_and_down_come_back_to_the_very_same_number():
    rate, seen = 3e-4, []
    for _ in range(6):
        rate = half_decade(rate, +1)
        seen.append(rate)
    assert seen == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    for _ in range(6):
        rate = half_decade(rate, -1)
    assert rate == 3e-4, "or the same rate would be tuned twice under two names"
