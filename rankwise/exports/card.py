"""The model card of an exported adapter: README.md for the Hugging Face Hub, and a picture of its ranks.

It says what the tensors, the configuration and the records beside the adapter tell (`origins`); what is not
recorded is left out. Equal input gives equal bytes. Every text from a file is put where Markdown and HTML
show it as it is (`code`, `prose`); the front matter holds checked identifiers alone.

Fields of the front matter: huggingface/hub-docs, modelcard.md and docs/hub/model-cards.md (commit 242f4a1e).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rankwise import markdown
from rankwise.errors import RankwiseError, one_of
from rankwise.exports.adapter_files import Adapter, Update
from rankwise.exports.origins import CARD, PLAIN, base_of, licence_of, own_card, plan_of, run_of
from rankwise.exports.programs import every, vllm_rank
from rankwise.inventory import KNOWN
from rankwise.plans import RankPlan

PICTURE, ORIGINAL = "ranks.png", "README.original.md"

FORMATS = {
    "uniform": "one rank and scale 1 on every module, so that every program scales it alike",
    "peft": "every module has its own rank and scale, by patterns that name it in full",
    "merged": "the base model's weights with the update added; there is no adapter left to load",
    "gguf": "a LoRA file for llama.cpp",
}
"""Format -> what a reader must know of it. The template has lines for each on how to load it."""

LICENCES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda "
    "cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research "
    "intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 "
    "openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community "
    "gemma".split()
)
"""What the Hub takes as `license`: hub-docs, docs/hub/repositories-licenses.md (commit 242f4a1e), without
`other` and `unknown`, which say nothing."""

ACROSS = 40  # layers side by side whose numbers can be read; more go down the page
MOST_LAYERS, MOST_PARTS = 400, 60  # of a picture; what has more is a table alone

_PLACE = re.compile(r"(?:.*?\.)?(?P<layer>\d{1,6})\.(?P<path>.+)", re.ASCII)


class Safe(str):
    """Markdown that was made here, and is not to be escaped again."""


@dataclass(frozen=True)
class Place:
    """A module's place in table and picture; `layer` is None where its name has no number."""

    name: str
    layer: int | None
    part: str
    rank: int
    cost: int


def write_card(
    folder: Path,
    adapter: Adapter,
    *,
    format: str,
    written: Sequence[Update] = (),
    ranks: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write README.md and ranks.png into a folder; keep the adapter's own card as README.original.md.

    Args:
        folder: exists, and holds what was exported.
        adapter: that was exported, as read: its neighbours on disk are its records.
        format: one of `FORMATS`.
        written: the updates as they are stored in the folder; none where none are (merged).
        ranks: module -> rank, where the export changed it: of an update that was cut, 0 of one that was
            filled with zeros. Padding is no rank.
        notes: sentences on the export: its self-check, and what a reader must know.

    Returns:
        The path of README.md.

    Raises:
        RankwiseError: no such format, or the picture cannot be written.
        OSError: the card cannot be written; `places` makes it a RankwiseError.

    Cost: 2 s, most of it the import of matplotlib; of a study also 0.1 s for each declared contrast.
    """
    if format not in FORMATS:
        raise RankwiseError(one_of("format", format, FORMATS))
    plan = plan_of(adapter)
    run = None if plan is None else run_of(adapter)  # records of other ranks are not this adapter's
    known = run if run is not None and not run["damaged"] else None
    base = base_of(adapter, known)
    places = _places(adapter, plan, ranks or {})
    original = own_card(adapter.folder)
    if original is not None:
        (folder / ORIGINAL).write_text(original, encoding="utf-8", newline="")
    facts = {
        "format": format,
        "what": FORMATS[format],
        "rankwise": importlib.metadata.version("rankwise"),
        "base": base,
        "name": code(base.shown) if base.shown else "a base model that it does not name",
        "licence": licence_of(adapter, base),
        "licences": LICENCES,
        "plan": plan,
        "run": known,
        "damaged": run is not None and known is None,
        "original": ORIGINAL if original is not None else None,
        "picture": PICTURE if _draw(places, folder / PICTURE) else None,
        "gguf": next((p.name for p in sorted(folder.glob("*.gguf")) if PLAIN.fullmatch(p.name)), "LORA.gguf"),
        "notes": notes,
        **_counts(places, adapter, written),
    }
    matter = yaml.safe_dump(_front_matter(facts, adapter), sort_keys=False, width=10_000)
    (folder / CARD).write_text(f"---\n{matter}---\n\n{_render(facts)}", encoding="utf-8", newline="")
    return folder / CARD


def _front_matter(facts: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Return the metadata, of identifiers that were checked.

    One base with an update folded in is a `finetune` on the Hub; a `merge` has two bases or more. PEFT cannot
    load a GGUF file, so that format names no library.
    """
    format, base, licence = facts["format"], facts["base"], facts["licence"]
    matter: dict[str, Any] = {}
    if licence and licence[0] in LICENCES:
        matter["license"] = licence[0]
    if base.hub:
        relation = "finetune" if format == "merged" else "adapter"
        matter |= {"base_model": base.hub, "base_model_relation": relation}
    if library := {"merged": "transformers", "gguf": None}.get(format, "peft"):
        matter["library_name"] = library
    if adapter.declared.task_type in (None, "CAUSAL_LM"):
        matter["pipeline_tag"] = "text-generation"
    if facts["run"] and facts["run"]["data"]["hub"]:
        matter["datasets"] = [facts["run"]["data"]["hub"]]
    return matter | {"tags": ["lora", "rankwise", *(["gguf", "llama-cpp"] if format == "gguf" else [])]}


# --- text that is shown as it is ---------------------------------------------------------------------


def code(text: object) -> Safe:
    """Return a text as a code span, in which nothing is a link or markup."""
    return Safe(markdown.code(text))


def prose(text: str) -> Safe:
    """Return a sentence in which no word is markup or a link."""
    return Safe(markdown.prose(text.strip()))


def _bare(value: str) -> Safe:
    """Return an identifier that is part of code or of a link."""
    assert PLAIN.fullmatch(value), value
    return Safe(value)


def _quoted(value: object) -> Safe:
    """Return a word for a shell, on one line of a code block."""
    return Safe(shlex.quote(markdown.line(value)))


def _render(facts: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rankwise"),
        finalize=lambda value: prose(value) if isinstance(value, str) and type(value) is not Safe else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "bare": _bare,
        "code": code,
        "json": lambda value: json.dumps(value, sort_keys=True),
        "n": lambda value: Safe(f"{value:,}"),
        "quoted": _quoted,
    }
    environment.globals["plural"] = lambda count, what: Safe(f"{count:,} {what}{'s' * (count != 1)}")
    return environment.get_template("adapter_card.md.j2").render(**facts)


# --- ranks -------------------------------------------------------------------------------------------


def _places(adapter: Adapter, plan: RankPlan | None, ranks: Mapping[str, int]) -> list[Place]:
    """Return every module with its rank: those of the plan, or those of the tensors by their names."""
    held = {update.name: update for update in every(adapter)}
    now = {name: update.rank for name, update in held.items()} | dict(ranks)
    if plan is not None:
        return [Place(m.name, m.layer, m.part, now.get(m.name, 0), m.cost) for m in plan.modules]
    matches = {name: _PLACE.fullmatch(name) for name in now}
    paths = {n: re.sub(r"\b\d+\.", "", m["path"]) if m else n for n, m in matches.items()}
    ends: dict[str, set[str]] = {}
    for path in paths.values():
        ends.setdefault(path.rpartition(".")[2], set()).add(path)
    found = []
    for name in sorted(now, key=lambda name: (matches[name] is None, *_order(paths[name]))):
        match, last = matches[name], paths[name].rpartition(".")[2]
        found.append(
            Place(
                name=name,
                layer=int(match["layer"]) if match else None,
                part=last if match and len(ends[last]) == 1 else paths[name],  # GPT-2 has two c_proj
                rank=now[name],
                cost=held[name].cost if name in held else 0,
            )
        )
    return found


def _order(path: str) -> tuple[bool, int, str]:
    """Sort attention before the rest, and each as a block computes it."""
    last = path.rpartition(".")[2]
    return "att" not in path, list(KNOWN).index(last) if last in KNOWN else len(KNOWN), path


def _counts(places: Sequence[Place], adapter: Adapter, written: Sequence[Update]) -> dict[str, Any]:
    """Return the table of parts, and sums of the ranks and of what is stored."""
    parts: dict[str, list[Place]] = {}
    for place in places:
        parts.setdefault(place.part, []).append(place)
    largest = max((update.rank for update in written), default=0)
    return {
        "parts": [
            {
                "name": part,
                "modules": len(held),
                "ranks": _span([place.rank for place in held]),
                "mean": f"{sum(place.rank for place in held) / len(held):.1f}",
                "parameters": sum(place.rank * place.cost for place in held),
            }
            for part, held in parts.items()
        ],
        "modules": sum(place.rank > 0 for place in places),
        "ranks": _span([place.rank for place in places if place.rank]),
        "parameters": sum(place.rank * place.cost for place in places),
        "outside": [place.name for place in places if place.layer is None],
        "scales": _span([update.scale for update in every(adapter)]),
        "stored": {
            "modules": len(written),
            "ranks": _span([update.rank for update in written]),
            "parameters": sum(update.parameters for update in written),
            "dtypes": ", ".join(sorted({str(u.b.dtype).removeprefix("torch.") for u in written})),
            "largest": largest,
            "vllm": vllm_rank(largest),
        },
    }


def _span(values: Sequence[float]) -> str:
    ends = [f"{value:g}" for value in (min(values), max(values))] if values else ["0"]
    return ends[0] if len(set(ends)) == 1 else f"{ends[0]} to {ends[1]}"


def _draw(places: Sequence[Place], path: Path) -> bool:
    """Draw the ranks, layers by parts; return whether there was something to draw."""
    layered = [place for place in places if place.layer is not None]
    layers, parts = len({place.layer for place in layered}), len({place.part for place in layered})
    if not layered or layers > MOST_LAYERS or parts > MOST_PARTS:
        return False
    from rankwise import figures, figuretables  # matplotlib takes a second

    modules = [{"name": place.name, "layer": place.layer, "part": place.part} for place in layered]
    cells = figuretables.heat_cells({"modules": modules, "ranks": {p.name: p.rank for p in layered}})
    picture = figures.picture(figures.rank_heatmap, cells, "double" if layers <= ACROSS else "single")
    figures.save(picture, path.with_suffix(""), ("png",))
    return True
