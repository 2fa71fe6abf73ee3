"""What an adapter_config.json declares: ranks and scales by PEFT's rule, and which are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from peft.utils.other import get_pattern_key
from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, PositiveInt, ValidationError

from rankwise.errors import RankwiseError

# Fields of LoraConfig under which an adapter is more, or other, than a sum of s B A.
_OTHER_LORA = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "Monte Carlo LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
}
# Starts that also change the base weights when the adapter is loaded, by an amount that depends on its rank.
_BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")

_Text = str | list[str] | None


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


class Declared(BaseModel):
    """What the configuration says about ranks and scales; names and defaults are PEFT's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: Annotated[dict[str, PositiveInt], BeforeValidator(_or_empty)] = {}
    alpha_pattern: Annotated[dict[str, FiniteFloat], BeforeValidator(_or_empty)] = {}
    use_rslora: bool = False
    target_modules: _Text = None
    exclude_modules: _Text = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    def rank(self, name: str) -> int:
        """Return the rank that PEFT would build a module with."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)

    def alpha(self, name: str) -> float:
        """Return the alpha that PEFT would give a module."""
        return self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)

    def scale(self, name: str, rank: int) -> float:
        """Return alpha/rank of a module, or alpha/sqrt(rank) under rsLoRA (2312.03732)."""
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json, whole.

    Raises:
        RankwiseError: it cannot be read, is not JSON, or names no PEFT type.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankwiseError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise RankwiseError(f"{path} is not valid JSON: {str(error) or 'nested too deep'}.") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise RankwiseError(f"{path} is not the configuration of a PEFT adapter: it names no peft_type.")
    return config


def read_declared(path: Path, config: dict[str, Any]) -> Declared:
    """Return what the configuration declares, or refuse an adapter that is not a plain sum of s B A.

    Args:
        path: of the file, for messages.
        config: its content.

    Raises:
        RankwiseError: another PEFT type, a variant of LoRA that is more than B A, trained biases, a start
            that changes the base weights, or fields of the wrong kind.
    """
    if config["peft_type"] != "LORA":
        raise RankwiseError(
            f"{path}: peft_type must be LORA (B A on each module); got {config['peft_type']!r}."
        )
    if other := [what for field, what in _OTHER_LORA.items() if config.get(field)]:
        raise RankwiseError(f"{path}: {', '.join(other)} is more than a sum of s B A, and not supported.")
    if config.get("bias", "none") != "none":
        raise RankwiseError(
            f"{path}: bias must be none; with {config['bias']!r} the adapter also changes the base's biases."
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_BASE_CHANGING):
        raise RankwiseError(
            f"{path}: an adapter that started as {start} changes the base weights as well. Convert it with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) first."
        )
    try:
        return Declared.model_validate(config)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:5])
        raise RankwiseError(f"{path} is not a sound LoRA configuration: {faults}.") from None
