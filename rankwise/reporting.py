"""What `rankwise report` writes: the page, every table as a file, and the figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise import datasizes, figures, figuretables, rows, sources
from rankwise.errors import RankwiseError
from rankwise.observer import Observer
from rankwise.report import export_tables, write_report
from rankwise.store import Store
from rankwise.studyfile import StudyFile, read_study
from rankwise.tables import Results

if TYPE_CHECKING:
    from rankwise.grid import Grid, Planned

Drawn = tuple[Callable[..., Any] | tuple[Callable[..., Any], ...], Any, dict[str, Any]]

MOST_ARMS = 12
"""Pictures with a line per arm name no more than these: the study's first, the baseline among them."""


def write_all(
    study: Path,
    results: Path,
    overrides: tuple[str, ...] = (),
    folder: Path | None = None,
    *,
    text: bool = False,
    pictures: bool = True,
) -> list[str]:
    """Write a study's report into a folder (else `reports/STUDY`) and say where each part lies.

    Args:
        study: the study file.
        results: folder of the records.
        overrides: `key=value` texts.
        folder: where to.
        text: show the data's text; such a page is for the eyes of whoever may see the data.
        pictures: also write the figures, as PDF, SVG and PNG.

    Raises:
        RankwiseError: the study was never run, or the rows cannot be had.

    Cost: some seconds a study; the figures take about a second each.
    """
    file = read_study(study, overrides)
    by_size = datasizes.records(file.config, results)
    if file.config.train_examples and not by_size:
        raise RankwiseError(
            f"no results yet of {file.config.name}: run the study first (`rankwise study run`)."
        )
    found = by_size[max(by_size)] if by_size else Results(Store(results, file.config.name))
    folder = folder or Path("reports") / file.config.name
    page = write_report(
        found,
        folder / "report.html",
        data_text=_texts(file) if text else None,
        by_size=by_size or None,
        settled=datasizes.sentences(by_size, file.config.train_examples) if by_size else (),
    )
    lines = [f"report: {page}" + (" (shows the data's text: for your own eyes)" if text else "")]
    lines.append(f"tables: {len(export_tables(found, folder / 'tables'))} files in {folder / 'tables'}/")
    if pictures:
        drawn, left_out = _figures(found, by_size, folder / "figures")
        lines.append(f"figures: {', '.join(drawn) or 'none yet'} in {folder / 'figures'}/")
        lines += [f"left out: {what}" for what in left_out]
    return lines


def _texts(file: StudyFile) -> dict[str, tuple[str, str]]:
    """Return row hash -> (prompt, response) of the study's rows."""
    with file.at("data", "source"):
        source = sources.fetch(file.config.data.source, kind="data", relative_to=file.path.parent)
        read = rows.read_rows(source.path)
    return {row.hash: _shown(row) for row in read.rows}


def _shown(row: rows.Row) -> tuple[str, str]:
    if row.form == "messages":
        asked = [f"{role}: {content}" for role, content in row.turns[:-1]]
        return "\n".join(asked), row.turns[-1][1]
    return "\n\n".join(filter(None, (row.prompt, row.context))), row.response


def _figures(results: Results, by_size: Mapping[int, Results], folder: Path) -> tuple[list[str], list[str]]:
    """Write every figure that the records have rows for; return their names, and which could not be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    few, named = _few(results), []
    for name, (draw, drawn, settings) in _wanted(results, by_size, few).items():
        if drawn:
            figures.save(figures.picture(draw, drawn, **settings), folder / name)
            named.append(name.replace("_", " "))
    planned = [(arm, results.plans(arm)[0]) for arm in few if results.plans(arm)]
    for arm, plan in planned:
        picture = figures.picture(figures.rank_heatmap, figuretables.heat_cells(plan))
        figures.save(picture, folder / f"ranks-{_file_name(arm)}")
    examples, left_out = _examples(results, folder)
    named += ["ranks by arm"] * bool(planned) + ["gains and losses by example"] * bool(examples)
    return named, left_out


def _wanted(results: Results, by_size: Mapping[int, Results], few: list[str]) -> dict[str, Drawn]:
    """Return the study's figures by name, with what each is drawn from and its settings."""
    rates = [point for point in figuretables.rate_points(results) if point.arm in few]
    return {
        "loss_against_parameters": (figures.loss_against_parameters, figuretables.loss_points(results), {}),
        "paired_differences": (figures.paired_differences, _differences(results), {}),
        "learning_rates": (figures.learning_rates, rates, {}),
        "training_curves": (figures.training_curves, *figuretables.smoothed_curves(results, few)),
        "rank_use": (figures.rank_use, figuretables.use_rows(results, few), {}),
        "time_and_memory": ((figures.times, figures.memory), figuretables.cost_rows(results), {}),
        "data_sizes": (figures.data_size, figuretables.size_points(by_size), {}),
    }


def _examples(results: Results, folder: Path) -> tuple[int, list[str]]:
    """Write the gains and losses by example; return how many, and which could not be drawn and why."""
    pairs, left_out = _pairs(results), []
    for arm, other in pairs:
        try:
            rows = figuretables.example_rows(results, arm, other)
        except RankwiseError as error:  # rows that are gone cost this picture alone, as on the page
            left_out.append(f"gains and losses of {arm} against {other}: {error}")
            continue
        picture = figures.picture(figures.example_differences, rows)
        figures.save(picture, folder / f"examples-{_file_name(arm)}-{_file_name(other)}")
    return len(pairs) - len(left_out), left_out


def _pairs(results: Results) -> list[tuple[str, str]]:
    """Return the declared contrasts, or else every arm against the baseline, that have a seed in common."""
    baseline = results.config.baseline
    against = [(arm, baseline) for arm in _few(results) if baseline and arm != baseline]
    wanted = results.config.pairs() or against
    return [(a, b) for a, b in wanted if results.losses(a).keys() & results.losses(b).keys()]


def _few(results: Results) -> list[str]:
    baseline = [results.config.baseline] if results.config.baseline else []
    return list(dict.fromkeys([*baseline, *results.config.arms]))[:MOST_ARMS]


def _differences(results: Results) -> list[Any]:
    if results.config.contrasts:
        return figuretables.difference_rows(results)
    return figuretables.baseline_differences(results) if results.config.baseline else []


def _file_name(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "@-_." else "-" for c in arm)


class LivePage(Observer):
    """Passes everything on to another observer, and rewrites the page when a run has ended.

    Drawing a large study takes a second or more, so that takes a twentieth of the time at
    most; whoever runs the study writes the last page when it is done.
    """

    def __init__(self, inner: Observer, store: Store, page: Path) -> None:
        self.inner, self.store, self.page = inner, store, page
        self.next = 0.0

    def finished(self, planned: Planned, status: str) -> None:
        """Rewrite the page, if it is time; a page that cannot be written stops nobody's runs."""
        self.inner.finished(planned, status)
        if time.monotonic() < self.next:
            return
        began = time.monotonic()
        try:
            results = Results(self.store)
            write_report(results, self.page)
        except (RankwiseError, OSError, ValueError, KeyError) as error:  # records that a person is editing
            self.inner.note(f"the report could not be written: {error}")
        self.next = time.monotonic() + 20 * (time.monotonic() - began)

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        """Pass it on."""
        self.inner.grid(grid, store, work)

    def started(self, planned: Planned, work: int) -> None:
        """Pass it on."""
        self.inner.started(planned, work)

    def work(self, planned: Planned, units: int) -> None:
        """Pass it on."""
        self.inner.work(planned, units)

    def waiting(self, runs: int) -> None:
        """Pass it on."""
        self.inner.waiting(runs)

    def note(self, text: str) -> None:
        """Pass it on."""
        self.inner.note(text)
