"""The report's pictures: rows of `figuretables` in, plotly's data out. Nothing is estimated here.

`comparisons`, `curves` and `costs` draw them, split as in `rankwise.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping

from rankwise import figuretables
from rankwise.report.comparisons import forest, loss_picture
from rankwise.report.costs import memory, rank_use, times
from rankwise.report.curves import rates, sizes, training
from rankwise.report.traces import Picture
from rankwise.tables import Results


def pictures(results: Results, by_size: Mapping[int, Results] | None = None) -> list[Picture]:
    """Return the pictures that the study's records allow, in the order of the page."""
    place = {arm: i for i, arm in enumerate(results.config.arms)}
    found = [loss_picture(figuretables.loss_points(results), place)]
    contrasts = figuretables.difference_rows(results)
    found.append(forest("contrasts", "Declared contrasts", contrasts, place))
    if results.config.baseline is not None:
        rows = figuretables.baseline_differences(results)
        found.append(forest("baseline", "Every arm minus the baseline", rows, place))
    found.append(rates(figuretables.rate_points(results), place))
    found.append(training(figuretables.curve_points(results), place))
    costs = figuretables.cost_rows(results)
    found += [times(costs, place), memory(costs, place), rank_use(figuretables.use_rows(results), place)]
    if by_size:
        found.append(sizes(figuretables.size_points(by_size), place))
    return [picture for picture in found if picture.drawn]
