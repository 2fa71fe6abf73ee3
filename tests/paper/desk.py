"""A small paper on a made-up study whose names are hostile, and on one that has not run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rankwise.paper import Fault, Offer, Paper, Work, offer, read_paper
from rankwise.paper.generating import generated, source_faults, stale_faults, write
from rankwise.tables import Results
from tests.made_up import made_up

MAIN = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[landscape,margin=1cm]{geometry}
\usepackage{mathptmx,courier,array,booktabs,longtable,graphicx,natbib}
\input{generated/numbers}
\newcommand{\arm}[1]{\texttt{\detokenize{#1}}}
\emergencystretch=3em
\begin{document}
\input{sections/results}
\bibliographystyle{plainnat}
\bibliography{references}
\end{document}
"""
RESULTS = r"""% 12 comments are no text, and 50\% of them better
The loss of \arm{spectral} is \madeUpSpectralTestLoss{}, as \citet{key} has it.
\madeUpOpening{} \madeUpVerdicts{}
\laterWhenRun{The loss of \arm{decay} is \laterDecayTestLoss{}.} See Table~\ref{tab:made-up-runs}.

\noindent\input{generated/made-up-arms}
\input{generated/made-up-runs}
\noindent\input{generated/made-up-fig-differences}

\input{generated/later-arms}
"""
BIB = "@article{key,\n title = {A Title},\n author = {Author, A.},\n journal = {Journal},\n year = {1999}}\n"
LATER = {
    "name": "later", "model": "hf:org/model",
    "data": {"source": "hf:org/rows", "train": 8, "validation": 4, "test": 4, "reserved": 4},
    "train": {"step_examples": 4, "learning_rates": [1e-3]},
    "seeds": {"tuning": 0, "reporting": 8}, "baseline": "uniform", "contrasts": ["decay"],
    "arms": {"uniform": {"strategy": "uniform", "budget": "r=2"},
             "decay": {"strategy": "linear_decay", "base": 4, "min": 1, "budget": "r=2"}},
}  # fmt: skip


@dataclass
class Desk:
    """A folder with studies, results and a paper."""

    folder: Path
    results: Results

    @property
    def paper_folder(self) -> Path:
        return self.folder / "paper"

    @property
    def generated(self) -> Path:
        return self.paper_folder / "generated"

    def offer(self) -> Offer:
        return offer(self.folder / "studies", self.folder / "results", self.paper().studies())

    def paper(self) -> Paper:
        return read_paper(self.paper_folder)

    def work(self) -> Work:
        return Work(self.paper(), self.offer())

    def write(self) -> dict[str, bytes]:
        files = generated(self.paper(), self.offer())
        write(self.paper_folder, files)
        return files

    def faults(self) -> list[str]:
        """Rule and place of everything that --check finds."""
        paper, found = self.paper(), self.offer()
        return told([*source_faults(paper, found), *stale_faults(paper, generated(paper, found))])

    def say(self, text: str) -> None:
        """Replace the results section."""
        (self.paper_folder / "sections" / "results.tex").write_text(text, encoding="utf-8")

    def change(self, arm: str, seed: int, loss: float) -> None:
        """Change the test loss of one reporting run's record."""
        run = next(r for r in self.results.index["runs"] if r["arm"] == arm and r["seed"] == seed)
        path = self.results.store.path(run["run_id"]) / "result.json"
        record = json.loads(path.read_text())
        record["train_info"]["metrics"]["test_loss"] = loss
        path.write_text(json.dumps(record))


def told(faults: Iterable[Fault]) -> list[str]:
    """Rule, file, line and text of each."""
    return [f"{fault.rule} {fault.place.path.name}:{fault.place.line} {fault.text}" for fault in faults]


def desk(folder: Path, **changes: Any) -> Desk:
    """Set a desk up; `changes` are those of `made_up`."""
    for name in ("studies", "results", "paper/sections"):
        (folder / name).mkdir(parents=True)
    results = made_up(folder / "results", **changes)
    config = results.config.model_dump(mode="json", exclude_unset=True)
    for text, study in (("made-up", config), ("later", LATER)):
        (folder / "studies" / f"{text}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "paper" / "main.tex").write_text(MAIN)
    (folder / "paper" / "references.bib").write_text(BIB)
    found = Desk(folder, results)
    found.say(RESULTS)
    return found
