"""What the commands share: the application, the options that several take, and how a study is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.config import MOST_PROCESSES
from rankwise.errors import RankwiseError

if TYPE_CHECKING:
    from rankwise.config import StudyConfig
    from rankwise.grid import Study

app = typer.Typer(
    name="rankwise",
    help="LoRA ranks per layer: which, does it matter, and what is the cheapest plan that is good enough?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
study_app = typer.Typer(help="Run a study, see its state, check its file.", no_args_is_help=True)
app.add_typer(study_app, name="study")

StudyPath = Annotated[Path, typer.Argument(help="the study file", metavar="STUDY.yaml")]
Results = Annotated[Path, typer.Option(help="folder of the records", envvar="RANKWISE_RESULTS")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: data.train=100", metavar="KEY=VALUE")
]
Checkpoint = Annotated[float, typer.Option(help="seconds between checkpoints of a run", min=0)]
RESULTS = Path("results")


def count_of(text: str) -> int | None:
    """Read --processes: a number, or None for auto."""
    if text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MOST_PROCESSES:
        raise RankwiseError(
            f"--processes must be auto or a whole number from 1 to {MOST_PROCESSES}; got {text!r}."
        )
    return int(text)


def sizes_of(path: Path, overrides: Sequence[str] | None) -> tuple[StudyConfig, dict[int, tuple[str, ...]]]:
    """Return the study as written, and what to override for each of its numbers of training rows."""
    from rankwise.datasizes import sized
    from rankwise.studyfile import read_study

    config = read_study(path, tuple(overrides or ())).config
    return config, sized(config, overrides or ())


def opened(path: Path, results: Path, overrides: Sequence[str] | None, arm: str | None = None) -> Study:
    """Open a study. What is wrong with its file is told at once, before PyTorch is loaded."""
    from rankwise.store import Store
    from rankwise.studyfile import read_study

    file = read_study(path, tuple(overrides or ()))
    if file.config.train_examples:
        raise RankwiseError(
            f"{path} asks over several numbers of training rows; choose one of them: --set train_examples=[] "
            f"--set data.train={file.config.train_examples[0]} --set "
            f"name={file.config.name}-n{file.config.train_examples[0]}"
        )
    if arm is not None:
        file.need_arm(arm)
    Store(results, file.config.name)
    from rankwise.study import open_study

    return open_study(path, results, tuple(overrides or ()))
