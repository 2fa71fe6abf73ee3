"""The tables as files: read back as they were, and names shown as they are."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rankwise.contrasts import contrast_rows
from rankwise.paper.tabulars import ladders_table
from rankwise.recommend import recommend
from rankwise.report import export_tables
from rankwise.report.columns import tables
from rankwise.report.exports import latex
from rankwise.tables import Results, arm_rows
from tests.made_up import TEX, made_up


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made_up(tmp_path_factory.mktemp("report"))


def test_csv_and_parquet_are_read_back_as_the_tables(results: Results, tmp_path: Path):
    export_tables(results, tmp_path)
    for table in tables(results):
        names = [column.name for column in table.columns]
        stored = pq.read_table(tmp_path / f"{table.name}.parquet")
        assert stored.column_names == names and [tuple(row.values()) for row in stored.to_pylist()] == list(
            table.rows
        )
        with (tmp_path / f"{table.name}.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        assert lines[0] == names and len(lines) == len(table.rows) + 1
        read = {
            "text": str,
            "whole": int,
            "number": float,
            "flag": lambda text: {"True": True, "False": False}[text],
        }
        for line, row in zip(lines[1:], table.rows, strict=True):
            for text, value, column in zip(line, row, table.columns, strict=True):
                assert (None if text == "" else read[column.kind](text)) == value, column.name


def test_the_tables_are_those_of_the_study(results: Results):
    found = {table.name: table for table in tables(results)}
    assert list(found) == ["arms", "contrasts", "learning_rates", "costs", "runs"]

    def column(table: str, name: str) -> list[Any]:
        place = [c.name for c in found[table].columns].index(name)
        return [row[place] for row in found[table].rows]

    assert column("arms", "loss") == [row.loss for row in arm_rows(results)]
    assert column("arms", "lowest_ranks") == [row.ranks and row.ranks[0] for row in arm_rows(results)]
    assert column("contrasts", "verdict") == [row.verdict for row in contrast_rows(results)]
    assert column("runs", "run_id") == [run["run_id"] for run in results.index["runs"]]
    for run_id, loss in zip(column("runs", "run_id"), column("runs", "test_loss"), strict=True):
        assert loss == results.records[run_id]["train_info"]["metrics"]["test_loss"]
    assert "test_bits_per_byte" in [c.name for c in found["runs"].columns]


def test_the_plans_of_ladders_are_a_table_as_the_paper_has_it(tmp_path: Path):
    made = made_up(tmp_path, ladders={"uniform": ["uniform", "spectral"], TEX: ["spectral", TEX]})
    names = [table.name for table in tables(made)]
    assert names == ["arms", "contrasts", "ladders", "learning_rates", "costs", "runs"]
    table = tables(made)[2]
    found = [dict(zip([c.name for c in table.columns], row, strict=True)) for row in table.rows]
    answer = recommend(made)
    rungs = [(one.name, one.chosen, rung) for one in answer.ladders for rung in one.rungs]
    for row, (ladder, chosen, rung) in zip(found, rungs, strict=True):
        assert (row["ladder"], row["plan"], row["chosen"]) == (ladder, rung.arm, rung.arm == chosen)
        assert (row["parameters"], row["loss"], row["level"]) == (rung.parameters, rung.loss, rung.level)
        assert (row["difference"], row["hardest_rival"]) == (rung.difference, rung.rival)
        assert row["upper_bound"] == rung.rival_bound
        assert row["shown"] == {True: "yes", False: "no", None: "not tested"}[rung.passed]
    assert {"yes", "no"} <= {row["shown"] for row in found} and any(row["chosen"] for row in found)
    export_tables(made, tmp_path / "out")
    tex = (tmp_path / "out" / "ladders.tex").read_text(encoding="utf-8")
    body = tex.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().split("\n")
    theirs = ladders_table(made).split("\\midrule\n")[1].split("\\bottomrule")[0].strip().split("\n")
    assert len(body) == len(theirs) == len(found) == 4
    for mine, other in zip(body, theirs, strict=True):
        losses = [
            next(c for c in line.split(" & ") if re.fullmatch(r"\d\.\d{4}", c)) for line in (mine, other)
        ]
        assert losses[0] == losses[1] and "%" not in mine.replace("\\%", "")


def test_latex_and_markdown_show_names_as_they_are(results: Results, tmp_path: Path):
    assert latex(TEX) == (
        r"\textbackslash{}input\{x\} \$x\textasciicircum{}2\$ \& 50\% \textbar{} "
        r"\textasciigrave{}a\textasciigrave{} \_b\_"
    )
    assert latex("---[x]") == r"-{}-{}-{[}x{]}"
    export_tables(results, tmp_path)
    tex = (tmp_path / "arms.tex").read_text(encoding="utf-8")
    body = tex.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().split("\n")
    columns = len(tables(results)[0].columns)
    assert len(body) == 4 and all(line.endswith(r" \\") for line in body)
    assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in body)
    assert "\\input" not in tex and r"\textless{}script\textgreater{}" in tex
    contrasts = (tmp_path / "contrasts.tex").read_text(encoding="utf-8")
    assert "$-$0." in contrasts and not math.isnan(contrast_rows(results)[0].p_holm or math.nan)
    for table in tables(results):
        lines = (tmp_path / f"{table.name}.md").read_text(encoding="utf-8").splitlines()[2:]
        assert len(lines) == len(table.rows) + 2
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(table.columns) + 1}
