"""The whole way: check, generate, compile, bundle; each says what it did and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.paper.building import compile_paper, log_faults, read_log
from rankwise.paper.bundle import PAGES, write_bundle
from rankwise.paper.catalogue import Offer
from rankwise.paper.generating import generated, source_faults, stale_faults, write
from rankwise.paper.rules import Fault
from rankwise.paper.sources import Paper

Said = tuple[list[str], list[Fault]]


@dataclass(frozen=True)
class Work:
    """A paper and what its studies offer."""

    paper: Paper
    offer: Offer

    def check(self) -> Said:
        """Return every fault of the text and of the generated pieces; write nothing and need no TeX.

        Cost: as to generate, about a second a figure.
        """
        faults = [*source_faults(self.paper, self.offer)]
        faults += stale_faults(self.paper, generated(self.paper, self.offer))
        return [_sum(faults)], faults

    def make(self, *, arxiv: bool = False) -> Said:
        """Generate, compile and, if wanted, bundle.

        Names that do not exist end it before anything is written; other faults are told at the end.

        Raises:
            RankwiseError: TeX is missing or finds errors. What is generated stays.
        """
        faults = source_faults(self.paper, self.offer)
        if any(fault.rule == "undefined" for fault in faults):
            return ["nothing was written: the paper uses what does not exist."], faults
        files = generated(self.paper, self.offer)
        write(self.paper.folder, files)
        pdf = compile_paper(self.paper.folder)
        log = read_log(self.paper.folder)
        faults += log_faults(self.paper.folder, log)
        pages = PAGES.search(log)
        lines = [f"paper: {pdf} ({pages[1] if pages else '?'} pages, {len(files)} generated files)"]
        if arxiv:
            path, count = write_bundle(self.paper, files)
            size = path.stat().st_size / 1e6
            lines.append(
                f"bundle: {path} ({size:.2f} MB); compiled by itself in an empty folder: {count} pages"
            )
        return [*lines, *([_sum(faults)] if faults else [])], faults


def _sum(faults: list[Fault]) -> str:
    if not faults:
        return "the paper is sound: nothing is stale, undefined, unused or typed by hand."
    return f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
