"""What the modules' inputs look like at label tokens: their principal components, as EVA has them.

Shapes: B rows, T tokens of the longest row, N label tokens, I in_features, k components.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch.nn import functional

from rankwise.budget import solve_gains
from rankwise.data import Example
from rankwise.engine import plain
from rankwise.engine.lora import same_input_groups
from rankwise.engine.paths import Plain
from rankwise.errors import RankwiseError
from rankwise.evidence import Cost, Evidence
from rankwise.inventory import Inventory
from rankwise.probes.watch import Setting, labelled, still, token_count

COMPONENTS = 64
"""Principal components of a module at most, unless the option says otherwise."""

PASSES = 100
"""Passes over the rows at most, where PEFT's rule is asked for; PEFT itself has no limit."""

Catch = Callable[[str, torch.Tensor], None]
"""Hears (module name, the module's input at label tokens (N, I)) of one call."""


def measure_inputs(setting: Setting) -> Evidence:
    """Return explained-variance ratios and principal components of the modules' inputs (EVA, 2410.07170).

    As PEFT's `get_eva_state_dict` does it: incremental PCA, micro-batch by micro-batch, over the tokens that
    carry a label themselves; modules that read the same input share one PCA; a module rests while the
    components that it needs agree with those before its last micro-batch (cosine of `tau` or more). Unlike
    there, a micro-batch with fewer label tokens than components is not skipped but merged with the next ones,
    and by default every row counts once: PEFT goes through the rows again until all modules rest.

    Always on the plain path (`engine` is not used), so it is right for every architecture. Nothing is drawn:
    the PCA's own seed is PEFT's 42, whatever `seed` is.

    Options:
        components: k at most; by default 64. Never more than the module's full rank or the label tokens.
        tau: cosine from which a component counts as settled; by default 0.99, PEFT's.
        rank: PEFT's own stop rule: pass over the rows until the components within a module's share of
            `rank` x modules ranks have settled; PEFT's ranks then come out. By default all components of a
            module must have settled for it to rest, so that the evidence serves every budget.
        batches: micro-batches at most; by default those of one pass, and of 100 under PEFT's rule.

    Raises:
        RankwiseError: a bad option; no row with labels; a module that the rows do not reach, or whose input
            does not have one row per token.

    Cost: a forward pass over the rows per pass, and about 40·N·I·k operations in float64 for every distinct
    input: 41 s for 5,600 tokens, 64 components, SmolLM2-135M on two cores, most of it in the PCA.
    """
    started = time.perf_counter()
    chosen, model, inventory = _options(setting.options), setting.model, setting.inventory
    batches = Plain().batches(labelled(setting.rows), setting.micro_tokens)
    limit = chosen["batches"] or (1 if chosen["rank"] is None else PASSES) * len(batches)
    tokens = sum(int(np.count_nonzero(row.labels != plain.IGNORE)) for row in setting.rows)
    with still(model):
        groups = _groups(model, inventory, min(chosen["components"], tokens))
        in_turn = list(itertools.islice(itertools.cycle(batches), limit))
        done = _fit(model, groups, in_turn, chosen, setting.on_progress)
    for group in groups:
        group.finish()
    unseen = [name for group in groups if not group.fitted for name in group.names]
    if unseen:
        raise RankwiseError(
            f"The inputs probe saw too few label tokens in {len(done)} micro-batches at {len(unseen)} "
            f"modules ({', '.join(unseen[:5])}...). Give more rows, ask for fewer components, or leave these "
            "modules out of the targets."
        )
    passed = token_count(row for batch in done for row in batch)
    settled = sum(len(group.names) for group in groups if group.settled(group.size))
    return Evidence(
        "inputs",
        _values(inventory, groups),
        Cost(passed, 0, -(-len(done) // len(batches)), time.perf_counter() - started),
        {**chosen, "batches": len(done), "settled": f"{settled} of {len(inventory)} modules"},
    )


class Group:
    """Modules that read one input, and the PCA of it.

    Attributes:
        names: the modules; the first one is watched.
        size: k.
        pca: PEFT's, set up as its EVA sets it up.
    """

    def __init__(self, names: Sequence[str], components: int) -> None:
        self.names = tuple(names)
        self.size = components
        self.pca = IncrementalPCA(n_components=components, copy=True, lowrank=True, lowrank_seed=42)
        self._held: list[torch.Tensor] = []
        self._alike = torch.zeros(components, dtype=torch.bool)

    @property
    def fitted(self) -> bool:
        """Whether there were enough label tokens for a first update."""
        return hasattr(self.pca, "components_")

    @property
    def ratios(self) -> np.ndarray:
        """The explained-variance ratios (k,), falling; 0 for an input that does not vary."""
        found = np.nan_to_num(self.pca.explained_variance_ratio_.double().cpu().numpy())
        return np.minimum.accumulate(found)  # rounding must not make a later one larger

    def settled(self, components: int) -> bool:
        """Whether the first `components` did not turn at the last update."""
        return bool(self._alike[:components].all())

    def hear(self, x: torch.Tensor, tau: float) -> None:
        """Take in (N, I) label tokens; held back until there are as many as components."""
        self._held.append(x.to(torch.float32))
        if sum(map(len, self._held)) < self.size:
            return
        before = self.pca.components_ if self.fitted else None
        self._update()
        if before is not None:
            self._alike = functional.cosine_similarity(self.pca.components_, before) >= tau

    def finish(self) -> None:
        """Take in what was held back."""
        if self._held and self.fitted:
            self._update()

    def _update(self) -> None:
        # unchecked, as only the first update needs as many tokens as components; `cat` makes the copy
        self.pca.partial_fit(torch.cat(self._held), check_input=False)
        self._held = []


def _groups(model: Any, inventory: Inventory, components: int) -> list[Group]:
    """Return the distinct inputs of the inventory's modules."""
    wanted = inventory.max_ranks
    groups = [[name for name in names if name in wanted] for names in same_input_groups(model)]
    together = {name for names in groups for name in names}
    groups += [[name] for name in inventory.names if name not in together]
    return [Group(names, min(components, max(wanted[n] for n in names))) for names in groups if names]


def _fit(
    model: Any,
    groups: Sequence[Group],
    batches: Sequence[list[Example]],
    chosen: Mapping[str, Any],
    on_progress: Callable[[int, int], None],
) -> list[list[Example]]:
    """Update the groups until all have settled; return the micro-batches that it took."""
    by_name = {group.names[0]: group for group in groups}
    needed = {name: group.size for name, group in by_name.items()}
    in_all = token_count(itertools.chain.from_iterable(batches))
    passed = 0
    for index, batch in enumerate(batches):
        turning = [name for name, group in by_name.items() if not group.settled(needed[name])]
        if not turning:
            on_progress(passed, passed)
            return list(batches[:index])
        watched = {name: model.get_submodule(name) for name in turning}
        pass_labels(model, batch, watched, lambda name, x: by_name[name].hear(x, chosen["tau"]))
        if chosen["rank"] is not None and all(group.fitted for group in groups):
            needed = _shares(groups, chosen["rank"])
        passed += token_count(batch)
        on_progress(passed, in_all)
    return list(batches)


def _shares(groups: Sequence[Group], rank: int) -> dict[str, int]:
    """Return how many components of each group PEFT would use: of the largest `rank` x modules ratios of all.

    Members of a group tie, and PEFT lets the one that is watched have the most.
    """
    ratios = {name: group.ratios for group in groups for name in group.names}
    counted = dict.fromkeys(ratios, 1)
    limits = {name: group.size for group in groups for name in group.names}
    ranks = solve_gains(ratios, counted, rank * len(ratios), limits)
    return {group.names[0]: max(ranks[name] for name in group.names) for group in groups}


def _values(inventory: Inventory, groups: Sequence[Group]) -> dict[str, dict[str, np.ndarray]]:
    values: dict[str, dict[str, np.ndarray]] = {"explained_variance_ratio": {}, "components": {}}
    for group in groups:
        directions = group.pca.components_.float().cpu().numpy()
        for name in group.names:
            limit = inventory.max_ranks[name]
            values["explained_variance_ratio"][name] = group.ratios[:limit].astype(np.float32)
            values["components"][name] = directions[:limit]
    return values


@torch.no_grad()
def pass_labels(
    model: Any, batch: Sequence[Example], modules: Mapping[str, torch.nn.Module], catch: Catch
) -> None:
    """Pass rows forward, padded, and hear the modules' inputs at the tokens that carry a label themselves.

    PEFT's EVA takes those positions (not the ones before them, which predict the labels). The head is not
    called.

    Args:
        model: in evaluation mode.
        batch: rows that are computed at once.
        modules: those to watch, by name.
        catch: hears them in the order in which they are called.

    Raises:
        RankwiseError: a module's input has not one row per token.
    """
    root = plain.unwrapped(model)
    place = root.get_input_embeddings().weight.device
    ids, mask, labels = (torch.from_numpy(array).to(place) for array in plain.pad(batch))
    wanted = labels != plain.IGNORE  # (B, T)
    trunk = getattr(root, root.base_model_prefix, root)
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = partial(_hear, name, wanted, catch)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        trunk(input_ids=ids, attention_mask=mask, use_cache=False)


def _hear(name: str, wanted: torch.Tensor, catch: Catch, module: Any, inputs: tuple[Any, ...]) -> None:
    x = inputs[0]
    if x.shape[:-1].numel() != wanted.numel():
        raise RankwiseError(
            f"The probe reads one input per token; {name} gets {tuple(x.shape)} for {tuple(wanted.shape)} "
            "rows and tokens (experts see only a part of them). Leave it out of the targets."
        )
    catch(name, x.detach().reshape(-1, x.shape[-1])[wanted.reshape(-1).to(x.device)])


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, checked and complete."""
    chosen = {"components": COMPONENTS, "tau": 0.99, "rank": None, "batches": None}
    if unknown := set(options) - set(chosen):
        raise RankwiseError(
            f"The inputs probe takes the options {', '.join(chosen)}; got {', '.join(sorted(unknown))}."
        )
    chosen |= options
    for name in ("components", "rank", "batches"):
        value = chosen[name]
        if value is None and name != "components":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RankwiseError(f"Option {name} must be a whole number of 1 or more; got {value!r}.")
    tau = chosen["tau"]
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not -1 <= tau <= 1:
        raise RankwiseError(f"Option tau must be a cosine, from -1 to 1; got {tau!r}.")
    return chosen
