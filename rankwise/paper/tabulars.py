"""Tables of a study as LaTeX: booktabs in the text, longtable where every arm or run is listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rankwise.contrasts import ContrastRow, contrast_rows
from rankwise.figuretables import rate_points
from rankwise.paper.groups import difference
from rankwise.paper.studies import Told
from rankwise.paper.typeset import NOT_RUN, ends, escaped, name, number
from rankwise.paper.verdicts import phrase
from rankwise.recommend import recommend
from rankwise.report.columns import LadderRow, ladder_rows
from rankwise.report.opening import missing_runs
from rankwise.tables import ArmRow, Results, arm_rows

NOTHING = "--"
ARMS = ("arm", "ranks", "parameters", "rate", "seeds", "loss", "SD", "gain", r"$\Delta$ uniform")


def tabular(columns: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a booktabs tabular; the cells are LaTeX."""
    lines = [
        rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"\toprule",
        _line(head),
        r"\midrule",
        *map(_line, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def longtable(
    columns: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str
) -> str:
    """Return a longtable that repeats its head; the caption is LaTeX."""
    lines = [
        rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}",
        rf"\caption{{{caption}}}\label{{{label}}}\\",
        r"\toprule", _line(head), r"\midrule", r"\endfirsthead",
        r"\toprule", _line(head), r"\midrule", r"\endhead",
        r"\bottomrule", r"\endlastfoot",
        *map(_line, rows),
        r"\end{longtable}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def shown(value: float | None, form: str) -> str:
    """Return a number, or a dash where there is none."""
    return NOTHING if value is None else number(value, form)


def arms_table(results: Results, arms: Sequence[str] | None = None) -> str:
    """Return the arms' means; * marks an arm outside the equal-budget comparison."""
    wanted = results.config.arms if arms is None else arms
    rows = [_arm(results, row) for row in arm_rows(results) if row.arm in wanted]
    untouched = ["untouched model", *[""] * 4, shown(results.untouched(), ".4f"), "", "", ""]
    return tabular(r"lrrrrrrrr", ARMS, [*rows, untouched])


def _arm(results: Results, row: ArmRow) -> list[str]:
    mark = r"\,*" if row.other_budget else ""
    whole = results.config.arms[row.arm]
    if whole.match == "budget":  # arms of every budget stand here, each compared within its own
        mark = ""
    return [
        name(row.arm) + mark,
        ends(row.ranks) or NOTHING,
        ends(row.parameters) or NOTHING,
        shown(row.rate, "g"),
        f"{row.done}/{row.wanted}" + (f", {row.failed} failed" if row.failed else ""),
        shown(row.loss, ".4f"),
        shown(row.loss_sd, ".4f"),
        shown(row.gain, ".4f"),
        shown(difference(results, row.arm), "+.4f"),
    ]


def contrasts_table(results: Results) -> str:
    """Return the declared contrasts with their tests, and the verdict in words."""
    seeds = results.config.seeds.reporting
    head = ("arm", "verdict", "against", "difference", r"95\,\% interval", r"$p$ (Holm)", r"$p$ (flips)",
            "could see")  # fmt: skip
    rows = [_contrast(row, seeds) for row in contrast_rows(results)]
    if not rows:
        return "No contrasts are declared.\n"
    columns = r">{\raggedright}p{3.0cm}>{\raggedright}p{2.7cm}>{\raggedright}p{2.3cm}rrrrr"
    return tabular(columns, head, rows)


def _contrast(row: ContrastRow, seeds: int) -> list[str]:
    p = row.paired
    interval = NOTHING if p is None else f"{number(p.low, '+.4f')} to {number(p.high, '+.4f')}"
    return [
        name(row.arm), phrase(row, seeds), name(row.against), shown(p.mean if p else None, "+.4f"), interval,
        _chance(row.p_holm), _chance(p.p_sign_flip if p else None),
        shown(p.detectable if p else None, ".4f"),
    ]  # fmt: skip


def _chance(p: float | None) -> str:
    """Return a p-value with three decimals, or that it is below; past 20 seeds there is no exact one."""
    if p is None or math.isnan(p):
        return NOTHING
    return r"\ensuremath{<}0.001" if p < 0.0005 else f"{p:.3f}"


def ladders_table(results: Results) -> str:
    """Return every ladder's plans: what they cost and lose, and how their tests ended."""
    if not results.config.ladders:
        return "The study declares no ladder.\n"
    head = (
        "ladder",
        "plan",
        "parameters",
        "loss",
        "to largest",
        "hardest rival",
        "at most",
        "level",
        "shown",
    )
    return tabular("llrrrlrrl", head, [_rung(row) for row in ladder_rows(recommend(results))])


def _rung(row: LadderRow) -> list[str]:
    mark = r"\,$\leftarrow$" if row.chosen else ""
    mark += f" ({row.failed} failed)" if row.failed else ""
    return [
        escaped(row.ladder), name(row.plan) + mark, shown(row.parameters, ",d"), shown(row.loss, ".4f"),
        shown(row.difference, "+.4f"), NOTHING if row.hardest_rival is None else name(row.hardest_rival),
        shown(row.upper_bound, "+.4f"),
        NOTHING if row.level is None else number(100 * row.level, ".2f", "%"), row.shown,
    ]  # fmt: skip


def rates_table(results: Results) -> str:
    """Return each arm's mean validation loss by rate; the chosen one is bold, "div." diverged."""
    points = rate_points(results)
    rates = sorted({point.x for point in points})
    by_arm: dict[str, dict[float, Any]] = {}
    for point in points:
        by_arm.setdefault(point.arm, {})[point.x] = point
    rows = []
    for arm, found in by_arm.items():
        cells = [name(arm)]
        for rate in rates:
            tried = found.get(rate)
            text = NOTHING if tried is None else "div." if tried.mean is None else f"{tried.mean:.4f}"
            cells.append(rf"\textbf{{{text}}}" if tried is not None and tried.chosen else text)
        rows.append(cells)
    if not rows:
        return "No learning rate was tuned.\n"
    caption = rf"Learning rates of {name(results.config.name)}: validation loss, mean over the tuning seeds."
    head, label = ("arm", *(f"{rate:g}" for rate in rates)), f"tab:{results.config.name}-rates"
    return (
        "\\begingroup\\small\n"
        + longtable("l" + "r" * len(rates), head, rows, caption, label)
        + "\\endgroup\n"
    )


def runs_table(results: Results) -> str:
    """Return every run that the study's index names."""
    head = ("arm", "role", "seed", "rate", "state", "loss", "parameters", "time", "record")
    rows = [_run(results, run) for run in results.index["runs"]]
    caption = (
        rf"Every run of {name(results.config.name)}. The loss is on validation rows for tuning runs and on "
        "test rows for the others; the record is the name of the run's folder."
    )
    label = f"tab:{results.config.name}-runs"
    return (
        "\\begingroup\\footnotesize\n" + longtable("llrrlrrrl", head, rows, caption, label) + "\\endgroup\n"
    )


def _run(results: Results, run: dict[str, Any]) -> list[str]:
    record = results.records.get(run["run_id"])
    info = (record or {}).get("train_info") or {}
    metric = "validation_loss" if run["role"] == "tuning" else results.config.primary
    loss = (info.get("metrics") or {}).get(metric)
    seconds = ((record or {}).get("run_info") or {}).get("total_time")
    return [
        name(run["arm"]), escaped(run["role"]), str(run["seed"]), shown(run["rate"], "g"),
        escaped(record["status"] if record else "missing"), shown(loss, ".4f"),
        shown(info.get("num_trainable_params"), ",d"),
        NOTHING if seconds is None else number(seconds, ".0f", "s"),
        rf"\texttt{{{escaped(run['run_id'])}}}",
    ]  # fmt: skip


def studies_table(studies: Sequence[Told]) -> str:
    """Return the studies in the given order: their designs, and how far they have run."""
    head = ("study", "arms", "seeds", "tuning", "train", "validation", "test", "contrasts", "runs")
    return tabular("lrrrrrrrr", head, [_study(study) for study in studies])


def _study(study: Told) -> list[str]:
    config = study.config
    if config is None:
        return [name(study.name), *[NOTHING] * 7, NOT_RUN]
    runs = NOT_RUN
    if study.results is not None:
        missing, wanted = missing_runs(study.results)
        runs = f"{wanted - missing:,}/{wanted:,}"
    whole = (len(config.arms), config.seeds.reporting, config.seeds.tuning, config.data.train,
             config.data.validation, config.data.test, len(config.contrasts))  # fmt: skip
    return [name(study.name), *(f"{value:,}" for value in whole), runs]
