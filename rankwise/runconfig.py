"""What a run is: its configuration, whose hash names it, and what all runs of a process share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from rankwise import models
from rankwise.config import NUMERICS, Frozen, ScaleRule, StudyConfig, Targets, TrainConfig, digest
from rankwise.data import Example, Prepared
from rankwise.engine.paths import Path as EnginePath
from rankwise.inventory import Inventory

Role = Literal["untouched", "tuning", "reporting"]


class Measured(Frozen):
    """What a run is measured by beyond its loss: the general text by its content, and how much it answers."""

    general: str | None = None
    generate: int = 0
    generate_tokens: int = 0


class RunConfig(Frozen):
    """Everything that decides a run's numbers. Its hash is the run's name.

    `model` and `data` are fingerprints, so that equal bytes from different places are the same run.
    """

    role: Role
    model: str
    data: str
    confirmatory: bool = False
    train_rows: int = 0
    study_targets: Targets = "all"
    targets: Targets = "all"
    strategy: str
    options: dict[str, Any] = Field(default_factory=dict)
    budget: str | int | None = None
    match: Literal["budget", "none"] = "none"
    scale: ScaleRule = ScaleRule()
    init: Literal["default", "eva", "gradient"] = "default"
    loraplus_lr_ratio: float = 1.0
    calibration: int = 0
    train: TrainConfig
    device: str
    dtype: str
    threads: int
    engine: str = "plain"
    seed: int
    numerics: int = NUMERICS
    # came later: left out where it says nothing, so that older records keep their names
    measure: Measured | None = Field(default=None, exclude_if=lambda value: value is None)

    @property
    def run_id(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of the canonical JSON."""
        return digest(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Context:
    """What all runs of a process share: the loaded base model, the prepared data, the inventory."""

    study: StudyConfig
    base: models.Base
    prepared: Prepared
    inventory: Inventory
    device: str
    dtype: str
    threads: int
    engine: EnginePath
    general: tuple[Example, ...] = ()

    @property
    def notices(self) -> list[str]:
        """Return what a reader of results must know, of the model, its modules, the engine and the rows."""
        engine = [] if self.engine.notice is None else [self.engine.notice]
        if self.engine.name != "plain" and self.study.train.dropout:
            engine.append("with dropout the adapters keep PEFT's own forward, which is slower")
        return [*self.base.notices, *self.inventory.notices, *engine, *self.prepared.notices]

    def test_rows(self, confirmatory: bool) -> tuple[Example, ...]:
        """Return the rows that reporting runs are scored on; only a confirmatory study gets the reserved."""
        return self.prepared.splits.reserved if confirmatory else self.prepared.splits.test
