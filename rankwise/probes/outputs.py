"""How much a briefly trained adapter adds to each module's output (LoRA-drop, arXiv 2402.07721).

Shapes: N label tokens, I in_features, O out_features, r rank.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise import adapters
from rankwise.config import ScaleRule, TrainConfig
from rankwise.data import Example
from rankwise.engine.paths import Plain
from rankwise.errors import RankwiseError
from rankwise.evidence import Cost, Evidence, Unmeasurable
from rankwise.plans import RankPlan
from rankwise.probes.inputs import pass_labels
from rankwise.probes.watch import Setting, labelled, still, token_count
from rankwise.strategies import allocate
from rankwise.train import Diverged, train_adapters

SCALE = 2.0
"""Of the brief adapter, whatever its rank."""


def measure_outputs(setting: Setting) -> Evidence:
    """Return the mean of ||s B A x||^2 over label tokens of every module, after a brief uniform training.

    Every `steps`-th row, starting from the i-th, forms step i: one pass over the rows in all (rows are used
    again where there are fewer than steps). AdamW at a constant rate; A starts as PEFT's does, drawn from the
    seed, B at 0, s = 2. Then x is what each adapted module reads at the tokens that carry a label, in the
    adapted model. The paper sums over a sample of the data after a share of the training and then drops
    adapters; here it is a mean, so that the number of rows does not matter.

    Options:
        rank: of the brief adapter on every module; by default 1.
        steps: optimizer steps; by default 4.
        rate: learning rate; by default 1e-3.

    Raises:
        RankwiseError: a bad option, no row with labels, a training that diverges, adapters on the model.

    Cost: a forward and a backward pass over the rows of the steps, and a forward pass over all rows.
    """
    started = time.perf_counter()
    chosen, model, engine = _options(setting.options), setting.model, setting.engine
    usable = labelled(setting.rows)
    steps = [usable[i :: chosen["steps"]] or [usable[i % len(usable)]] for i in range(chosen["steps"])]
    trained = token_count(itertools.chain.from_iterable(steps))
    in_all = 3 * trained + token_count(usable)  # a backward pass counts twice
    seen = 0

    def tell(tokens: int) -> None:
        nonlocal seen
        seen += tokens
        setting.on_progress(seen, in_all)

    plan = allocate(
        setting.inventory, strategy="uniform", match="none", options={"base": chosen["rank"]},
        scale=ScaleRule(rule="constant", value=SCALE),
    )  # fmt: skip
    config = TrainConfig(
        learning_rates=(chosen["rate"],), schedule="constant", warmup=0, micro_tokens=setting.micro_tokens
    )
    with still(model), _own_draws(model), _attached(model, plan, setting.seed) as adapted:
        with tempfile.TemporaryDirectory() as folder, engine.installed(adapted), torch.enable_grad():
            try:
                train_adapters(
                    adapted, steps, config, rate=chosen["rate"], seed=setting.seed, folder=Path(folder),
                    engine=engine, on_step=lambda entry: tell(3 * entry["tokens"]),
                )  # fmt: skip
            except Diverged as error:
                raise Unmeasurable(
                    f"The outputs probe's brief training diverged at {error}. Lower its option rate, "
                    f"{chosen['rate']:g}."
                ) from None
        values = _mean_squares(adapted, Plain().batches(usable, setting.micro_tokens), tell)
    cost = Cost(trained + token_count(usable), trained, 2, time.perf_counter() - started)
    return Evidence("outputs", {"mean_square": values}, cost, {**chosen, "scale": SCALE})


@contextmanager
def _own_draws(model: Any) -> Iterator[None]:
    """Give PyTorch's random generators back as they were: training seeds them at every step."""
    places = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(places)):
        yield


@contextmanager
def _attached(model: Any, plan: RankPlan, seed: int) -> Iterator[Any]:
    """Put a plan's adapters on for a while; they come off also where putting them on fails half-way."""
    adapted = None
    try:
        adapted = adapters.attach(model, plan, seed=seed)
        yield adapted
    finally:
        if adapted is not None:
            adapters.detach(adapted)
        for name, layer in adapters.lora_layers(model).items():
            model.set_submodule(name, layer.get_base_layer())
        vars(model).pop("peft_config", None)


@torch.no_grad()
def _mean_squares(
    adapted: Any, batches: Sequence[Sequence[Example]], tell: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Return module name -> mean of ||s B A x||^2 over label tokens, summed in float64."""
    layers: dict[str, Any] = dict(adapters.lora_layers(adapted))
    sums = dict.fromkeys(layers, 0.0)
    counts = dict.fromkeys(layers, 0)

    def hear(name: str, x: torch.Tensor) -> None:
        update = _update(layers[name], x)
        sums[name] += update.double().square().sum().item()
        counts[name] += len(x)

    adapted.eval()
    for batch in batches:
        pass_labels(adapted, batch, layers, hear)
        tell(token_count(batch))
    if uncalled := [name for name, count in counts.items() if not count]:
        raise RankwiseError(
            f"The calibration rows never reach {', '.join(uncalled[:5])}. Leave them out of the targets."
        )
    return {name: np.asarray(sums[name] / counts[name], dtype=np.float32) for name in layers}


def _update(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return s B A x for inputs (N, I), as (N, O)."""
    a: torch.Tensor = layer.lora_A[adapters.ADAPTER].weight
    b: torch.Tensor = layer.lora_B[adapters.ADAPTER].weight
    return torch.mm(torch.mm(x.to(a.dtype), a.t()), b.t()) * layer.scaling[adapters.ADAPTER]


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, checked and complete."""
    chosen = {"rank": 1, "steps": 4, "rate": 1e-3}
    if unknown := set(options) - set(chosen):
        raise RankwiseError(
            f"The outputs probe takes the options {', '.join(chosen)}; got {', '.join(sorted(unknown))}."
        )
    chosen |= options
    for name in ("rank", "steps"):
        value = chosen[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RankwiseError(f"Option {name} must be a whole number of 1 or more; got {value!r}.")
    rate = chosen["rate"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise RankwiseError(f"Option rate must be a finite number above 0; got {rate!r}.")
    return chosen
