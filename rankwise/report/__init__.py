"""The report of a study: one offline HTML page, and every table as a file.

page.py         the page, written in one step
opening.py      the first sentences, warnings, notes
columns.py      the tables as typed columns
results.py      the page's tables
exports.py      the tables as CSV, Parquet, LaTeX, Markdown
pictures.py     rows of figures to plotly's data, by comparisons.py, curves.py and costs.py
traces.py       what the pictures share
marks.py        colours and markers, as the figures have them
details.py      what opens when an arm is clicked
settings.py     settings, machines, what it takes to run the study again
"""

from __future__ import annotations

from rankwise.report.exports import export_tables
from rankwise.report.page import write_report

__all__ = ["export_tables", "write_report"]
