"""The rank plan: which module gets which rank under which scale rule, and where that came from.

`plan.json` is the seam that a person reviews. Everything before it decides; everything after it
obeys. Reading or writing one needs neither torch nor PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rankwise.aside import replacing
from rankwise.config import Frozen, ScaleRule, Targets
from rankwise.errors import RankwiseError, visible

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["FORMAT", "PlanModule", "RankPlan", "ScaleRule"]

FORMAT = 1
"""Number of the file format, raised when a plan written before could be read wrongly."""

_MARK = "rankwise_plan"
_OWN_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "use_rslora", "fan_in_fan_out",
)  # fmt: skip


class PlanModule(Frozen):
    """The shape of one planned module: a linear map from `in_features` to `out_features`."""

    name: str
    layer: int
    part: str
    kind: str
    in_features: int
    out_features: int
    conv1d: bool = False

    @property
    def cost(self) -> int:
        """Trainable parameters of one unit of rank."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """Full rank."""
        return min(self.in_features, self.out_features)


class RankPlan(Frozen):
    """Whole ranks for every target module (0: no adapter), with the scale rule and the provenance.

    `budget` is in trainable parameters; None under `match: none`. `exclude` holds names of other
    modules that PEFT would take for planned ones, because their names end alike.
    """

    model: str
    strategy: str
    options: dict[str, Any] = Field(default_factory=dict)
    targets: Targets = "all"
    match: Literal["budget", "none"] = "budget"
    budget: int | None = None
    scale: ScaleRule = ScaleRule()
    ranks: dict[str, int]
    modules: tuple[PlanModule, ...]
    exclude: tuple[str, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options", "provenance", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        # What a file gives back must equal what was put in: {0: 8} would come back as {"0": 8}.
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"not writable as JSON: {error}") from None

    @model_validator(mode="after")
    def _consistent(self) -> RankPlan:
        names = [module.name for module in self.modules]
        if len(set(names)) != len(names) or set(names) != set(self.ranks):
            raise ValueError("ranks and modules must name the same modules, each once")
        for module in self.modules:
            if not 0 <= self.ranks[module.name] <= module.max_rank:
                raise ValueError(
                    f"the rank of {module.name} must be from 0 to its full rank {module.max_rank}; "
                    f"got {self.ranks[module.name]}"
                )
        if (self.match == "none") != (self.budget is None):
            raise ValueError("a plan has a budget exactly when match is 'budget'")
        if self.budget is not None and self.parameters > self.budget:
            raise ValueError(f"{self.parameters:,} parameters are over the budget of {self.budget:,}")
        return self

    @property
    def parameters(self) -> int:
        """Trainable parameters: the sum of cost x rank over the modules."""
        return sum(module.cost * self.ranks[module.name] for module in self.modules)

    @property
    def leftover(self) -> int | None:
        """Parameters of the budget that are not spent; None without a budget."""
        return None if self.budget is None else self.budget - self.parameters

    def lora_config(self, dropout: float = 0.0, **settings: Any) -> LoraConfig:
        r"""Return the PEFT configuration that gives every module its rank and its scale.

        PEFT matches a pattern key as `(.*\.)?(key)$` and takes the first that fits, so keys are whole
        names, escaped, behind `^`: `h.1` can then be neither the end of another name nor `h.11`.

        Args:
            dropout: Probability of dropping an input of A.
            settings: Further `LoraConfig` fields, other than those that the plan decides.

        Raises:
            RankwiseError: every rank is 0, or a setting would contradict the plan.
        """
        used = [module for module in self.modules if self.ranks[module.name] > 0]
        if not used:
            raise RankwiseError("Every rank of this plan is 0, so there is no adapter to build.")
        if clash := sorted(set(settings) & set(_OWN_FIELDS)):
            raise RankwiseError(
                f"The plan decides {', '.join(clash)}: change the plan instead (dropout=...)."
            )
        from peft import LoraConfig  # here, so that reading a plan does not load torch

        ranks = {module.name: self.ranks[module.name] for module in used}
        fields: dict[str, Any] = {
            **patterns(ranks, {name: self.scale.alpha(rank) for name, rank in ranks.items()}),
            "task_type": "CAUSAL_LM",
            "lora_dropout": dropout,
            "target_modules": list(ranks),
            "fan_in_fan_out": all(module.conv1d for module in used),
        }
        if self.exclude:
            fields["exclude_modules"] = list(self.exclude)
        return LoraConfig(**{**fields, **settings})

    def to_json(self) -> str:
        """Return the plan as indented JSON; equal plans give equal text."""
        content = {_MARK: FORMAT, **self.model_dump(mode="json")}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the plan in one step: a reader sees the old file or the new one, never a part.

        Raises:
            RankwiseError: the file cannot be written there.
        """
        path = Path(path)
        try:
            with replacing(path) as aside:
                aside.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise RankwiseError(f"The plan cannot be written to {path}: {error.strerror or error}.") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read a plan.

        Raises:
            RankwiseError: no such file, not JSON, not a rank plan, of another format number, or
                contradicting itself. The text says which.
        """
        content = _read(Path(path))
        if content.pop(_MARK) != FORMAT:
            raise RankwiseError(
                f"{path} is a rank plan of another format; this rankwise reads format {FORMAT}. "
                "Make the plan again, or use the version that wrote it."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = "; ".join(
                ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))
                for fault in error.errors()[:5]
            )
            raise RankwiseError(f"{path} is not a sound rank plan: {faults}.") from None

    def table(self) -> Table:
        """Return the plan as a table: a row per layer, a column per part, parameters at the edges."""
        parts = list(dict.fromkeys(module.part for module in self.modules))
        title = escape(visible(f"{self.strategy} on {self.model}"))
        table = Table(title=title, caption=escape(self._caption()), box=SIMPLE_HEAD, padding=(0, 1))
        table.show_footer = True
        table.add_column("layer", footer="all", justify="right", no_wrap=True)
        for part in parts:
            footer = short(self._sum(part=part))
            table.add_column(escape(visible(part)), footer=footer, justify="right", no_wrap=True)
        table.add_column("params", footer=short(self.parameters), justify="right", no_wrap=True)
        for layer in sorted({module.layer for module in self.modules}):
            cells = [self._cell(layer, part) for part in parts]
            table.add_row(str(layer), *cells, short(self._sum(layer=layer)))
        return table

    def _caption(self) -> str:
        if self.budget is None:
            money = f"{self.parameters:,} parameters, no budget (the formula's own ranks)"
        else:
            money = f"{self.parameters:,} of {self.budget:,} parameters, {self.leftover:,} left"
        return f"{money}; scale {self.scale}"

    def _cell(self, layer: int, part: str) -> str:
        ranks = [self.ranks[m.name] for m in self.modules if m.layer == layer and m.part == part]
        if len(ranks) < 2:
            return "".join(map(str, ranks))
        low, high = min(ranks), max(ranks)
        return f"{len(ranks)}x {low}" if low == high else f"{len(ranks)}x {low}-{high}"

    def _sum(self, *, layer: int | None = None, part: str | None = None) -> int:
        return sum(
            m.cost * self.ranks[m.name]
            for m in self.modules
            if (layer is None or m.layer == layer) and (part is None or m.part == part)
        )


def short(count: int) -> str:
    """Return a count in at most six characters: 949, 12.3k, 4.88M."""
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.1f}k" if count < 999_950 else f"{count / 1e6:.2f}M"


def patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of `LoraConfig` under which each module gets its rank and alpha, without rsLoRA.

    `r` and `lora_alpha` are the most frequent pair, which leaves the fewest patterns.
    """
    whole = {name: whole_alpha(alpha) for name, alpha in alphas.items()}
    (rank, alpha), _ = Counter((ranks[name], whole[name]) for name in ranks).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_key(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern_key(name): value for name, value in whole.items() if value != alpha},
    }


def pattern_key(name: str) -> str:
    r"""Return the key of `rank_pattern` and `alpha_pattern` that fits this module alone.

    PEFT matches a key as `(.*\.)?(key)$`: unanchored, `h.1` would also be the end of another name.
    """
    return "^" + re.escape(name)


def whole_alpha(alpha: float) -> int | float:
    """Return an alpha as an integer where it is one (to rounding), as other programs read it."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankwiseError(f"The plan {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise RankwiseError(f"{path} is not text in UTF-8, so it is not a rank plan.") from None
    except json.JSONDecodeError as error:
        raise RankwiseError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise RankwiseError(f"{path} is nested too deep to be a rank plan.") from None
    if not isinstance(content, dict) or _MARK not in content:
        peft = isinstance(content, dict) and "peft_type" in content
        kind = "PEFT adapter configuration" if peft else "file without the mark of a rank plan"
        raise RankwiseError(
            f"{path} is a {kind} ({_MARK!r} is missing). Plans come from `rankwise plan --out`."
        )
    return content
