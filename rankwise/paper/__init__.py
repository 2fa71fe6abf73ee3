"""The paper: prose by hand, every number, table, figure and verdict word from the records.

names.py       study, arm and quantity -> the letters of a macro's name
typeset.py     numbers, units and foreign text as LaTeX
macros.py      a macro; the catalogue of all, in which no name stands twice
studies.py     study files and their records, as far as there are any
quantities.py  the numbers of arms and studies
groups.py      arms of one budget side by side
verdicts.py    the words of verdicts, from the functions that the report uses
tabulars.py    tables
pictures.py    figures as PDF
repeats.py     runs made on two kinds of device, and how far apart they end
catalogue.py   all of it by name
sources.py     what the hand-written files use, and where
rules.py       numbers and verdicts typed by hand; names that do not exist
references.py  citations and labels
generating.py  the folder `generated`, and whether it is stale
building.py    latexmk, and what its log tells
bundle.py      the archive for arXiv, proved in an empty folder
work.py        the whole way, for the command
"""

from rankwise.paper.catalogue import Offer, offer
from rankwise.paper.rules import RULES, Fault
from rankwise.paper.sources import Paper, read_paper
from rankwise.paper.work import Work

__all__ = ["RULES", "Fault", "Offer", "Paper", "Work", "offer", "read_paper"]
