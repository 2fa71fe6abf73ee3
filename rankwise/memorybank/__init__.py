"""The memory bank: a project's living documents, of which studies and records write a part.

documents.py   the eight documents: begun, renewed, checked
markers.py     the generated parts of a document that people write
cases.py       study files beside their records
ground.py      what every page stands on: studies, places, links
findings.py    what a study found, in sentences
focus.py       status, what was learnt, what is next, what stands in the way
progress.py    what ran and what failed
questions.py   the earlier study's open questions, with the evidence so far
knowledge.py   every study's numbers
readme.py      the results of a README, with their picture
text.py        text that Markdown shows as it is
"""

from __future__ import annotations

from rankwise.memorybank.documents import DOCUMENTS, Memory, write_memory

__all__ = ["DOCUMENTS", "Memory", "write_memory"]
