"""Every table of a study as CSV, Parquet, LaTeX and Markdown. The same records give the same bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

from rankwise.aside import replacing
from rankwise.errors import RankwiseError, visible
from rankwise.markdown import prose
from rankwise.report.columns import Column, Table, tables
from rankwise.tables import Results

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}",  # a cell that began with [ would be an argument of the \\ before it
    "'": r"\textquotesingle{}", "`": r"\textasciigrave{}",
}  # fmt: skip


def latex(text: str) -> str:
    """Return text that LaTeX typesets as it is; control characters are written out."""
    return "".join(LATEX.get(c, c) for c in visible(text)).replace("--", "-{}-").replace("--", "-{}-")


def export_tables(results: Results, folder: Path) -> list[Path]:
    """Write `<table>.csv`, `.parquet`, `.tex` and `.md` for every table of the study.

    CSV and Parquet hold full numbers; a missing value is empty in CSV, null in Parquet. The LaTeX needs the
    packages booktabs and textcomp, the latter part of LaTeX since 2020.

    Args:
        results: The study, finished or not.
        folder: Made if it is missing; each file is replaced in one step.

    Returns:
        The files, in the order of the tables.

    Raises:
        RankwiseError: the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table in tables(results):
            for ending, write in WRITERS.items():
                path = folder / f"{table.name}.{ending}"
                with replacing(path) as aside:
                    write(table, aside)
                written.append(path)
    except OSError as error:
        why = error.strerror or error
        raise RankwiseError(f"the tables cannot be written to {folder}: {why}.") from error
    return written


def _csv(table: Table, path: Path) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(column.name for column in table.columns)
    lines.writerows(["" if value is None else value for value in row] for row in table.rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def _parquet(table: Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"text": pa.string(), "whole": pa.int64(), "number": pa.float64(), "flag": pa.bool_()}
    arrays = [
        pa.array([_plain(row[i], column) for row in table.rows], types[column.kind])
        for i, column in enumerate(table.columns)
    ]
    names = [column.name for column in table.columns]
    pq.write_table(pa.table(arrays, names=names), path)


def _plain(value: object, column: Column) -> object:
    return float(value) if column.kind == "number" and isinstance(value, int) else value


def _latex(table: Table, path: Path) -> None:
    sides = "".join("r" if c.kind in ("whole", "number") else "l" for c in table.columns)
    head = " & ".join(latex(c.name.replace("_", " ")) for c in table.columns)
    lines = [
        f"% {table.caption} Needs \\usepackage{{booktabs}}.",
        f"\\begin{{tabular}}{{@{{}}{sides}@{{}}}}",
        r"\toprule",
        head + r" \\",
        r"\midrule",
        *(" & ".join(cells) + r" \\" for cells in map(_latex_cells, repeat(table), table.rows)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _latex_cells(table: Table, row: tuple[object, ...]) -> list[str]:
    cells = []
    for column, value in zip(table.columns, row, strict=True):
        number = column.kind in ("whole", "number") and value is not None
        text = column.shown(value)
        cells.append(text.replace("-", "$-$") if number else latex(text))
    return cells


def _markdown(table: Table, path: Path) -> None:
    rule = ("---:" if c.kind in ("whole", "number") else "---" for c in table.columns)
    lines = [
        prose(table.caption),
        "",
        _line([prose(c.name) for c in table.columns]),
        _line(list(rule)),
        *(_line([prose(cell) for cell in cells]) for cells in _cells(table)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(table: Table) -> list[list[str]]:
    return [[c.shown(v) for c, v in zip(table.columns, row, strict=True)] for row in table.rows]


WRITERS: dict[str, Callable[[Table, Path], None]] = {
    "csv": _csv, "parquet": _parquet, "tex": _latex, "md": _markdown,
}  # fmt: skip
