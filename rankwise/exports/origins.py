"""Where an adapter comes from, as far as files on this machine tell: its base, licence, plan, and run.

Nothing is fetched and nothing is guessed; what is not recorded is None. Texts are returned as they stand in
the files, without folders of this machine: whoever shows them escapes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from rankwise import datacard, sources
from rankwise.errors import RankwiseError
from rankwise.exports.adapter_files import Adapter
from rankwise.exports.programs import every
from rankwise.plans import RankPlan
from rankwise.runconfig import RunConfig
from rankwise.store import Store, read_json
from rankwise.tables import Results

CARD = "README.md"

BASES = {
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "apache-2.0",
    )
}
"""SHA-256 of a base's file -> its name, and its licence as `general.license` in its header gives it."""

MOST_TEXT = 1_000_000  # bytes of somebody's card

PLAIN = re.compile(r"[\w./-]{1,100}", re.ASCII)
"""What may stand in code, links and front matter as it is."""

_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)", re.ASCII)
_DEQUANTISED = re.compile(r"([0-9a-f]{16})-transformers-[\w.]+", re.ASCII)  # as `models` calls its copy
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Base:
    """The base model as far as it is known.

    Attributes:
        shown: its name; None if the adapter names none.
        source: where it came from, if that says more than the name.
        hub: its id on the Hub.
        revision: commit or branch there.
        sha256: of its file or folder.
        gguf: name of its GGUF file.
        folder: where it may lie on this machine; not to be shown.
    """

    shown: str | None = None
    source: str | None = None
    hub: str | None = None
    revision: str | None = None
    sha256: str | None = None
    gguf: str | None = None
    folder: Path | None = None


# --- the base and its licence ------------------------------------------------------------------------


def base_of(adapter: Adapter, run: Mapping[str, Any] | None) -> Base:
    """Return the base by the run's record, or by what adapter_config.json names."""
    name = adapter.declared.base_model_name_or_path
    folder = Path(os.path.expanduser(name)) if name else None  # noqa: PTH111 - a Path raises for ~nobody
    return _declared(adapter, name, folder) if run is None else _recorded(run, folder)


def _declared(adapter: Adapter, name: str | None, folder: Path | None) -> Base:
    if not name:
        return Base()
    if found := _SNAPSHOT.search(name.replace("\\", "/")):
        id = f"{found[1]}/{found[2]}"
        return Base(shown=id, hub=hub_id(id), revision=found[3], folder=folder)
    if hub_id(name) and not Path(name).exists():
        return Base(shown=name, hub=name, revision=_plain(adapter.declared.revision))
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    if found := _DEQUANTISED.fullmatch(last):
        for sha256, (gguf, _) in BASES.items():
            if sha256.startswith(found[1]):
                return Base(shown=gguf, sha256=sha256, gguf=gguf, folder=folder)
    return Base(shown=last, folder=folder)


def _recorded(run: Mapping[str, Any], folder: Path | None) -> Base:
    source, fingerprint = sources.parse(run["base"]["source"]), run["base"]["fingerprint"]
    commit = fingerprint.partition("hf-commit:")[2] or None
    last = Path(source.path or "").name
    hub = hub_id(source.name) if source.scheme == "hf" else None
    return Base(
        shown=hub or last,
        source=None if source.scheme == "file" else shown_source(source),
        hub=hub,
        revision=_plain(commit or source.version) if hub else None,
        sha256=None if commit else fingerprint,
        gguf=last if last.lower().endswith(".gguf") and _plain(last) else None,
        folder=folder,
    )


def hub_id(name: str | None) -> str | None:
    """Return a name that can be a repository org/name on the Hub, else None."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name if name and name.isascii() and name.count("/") == 1 else None


def shown_source(source: sources.Source) -> str:
    """Return a source without its pin, and of a file its name alone."""
    if source.scheme == "file":
        return Path(str(source.path)).name
    version = "" if source.version is None else f"{'==' if source.scheme == 'pypi' else '@'}{source.version}"
    return f"{source.scheme}:{source.name}{version}{'/' if source.path else ''}{source.path or ''}"


def _plain(text: str | None) -> str | None:
    return text if text and PLAIN.fullmatch(text) else None


def licence_of(adapter: Adapter, base: Base) -> tuple[str, str] | None:
    """Return the licence that somebody states, and who; the adapter's own card comes first."""
    stated = [(_of_card(adapter.folder / CARD), "the adapter's own card")]
    if base.sha256 in BASES:
        stated += [(BASES[base.sha256][1], "the header of the base's file")]
    if base.folder is not None:
        stated += [(_of_card(base.folder / CARD), "the base's own card")]
        stated += [(_of_text(base.folder / "LICENSE"), "the base's LICENSE file")]
    if base.hub is not None:
        cached = try_to_load_from_cache(base.hub, CARD, revision=base.revision)
        stated += [(_of_card(Path(cached)), "the base's own card")] if isinstance(cached, str) else []
    return next(((text, who) for text, who in stated if text), None)


def _of_card(path: Path) -> str | None:
    """Return what a card's front matter gives as `license`."""
    front = _FRONT.match(_text(path) or "")
    try:
        found = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    stated = found.get("license") if isinstance(found, dict) else None
    return stated.strip().lower() if isinstance(stated, str) else None


def _of_text(path: Path) -> str | None:
    head = " ".join((_text(path) or "").lower().split())
    if head.startswith("apache license version 2.0"):
        return "apache-2.0"
    return "mit" if head.startswith(("mit license", "the mit license")) else None


def _text(path: Path) -> str | None:
    """Return a file's text; None for what is no regular file, too large, or not UTF-8."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_TEXT:
            return None
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError):
        return None


def own_card(folder: Path) -> str | None:
    """Return somebody's card of the adapter; None if there is none, or PEFT's form that nobody filled in.

    A link could name any file of this machine: it is followed into the Hub's own cache alone, where every
    file of a snapshot is a link to `../../blobs`.
    """
    path = folder / CARD
    text, blobs = _text(path), folder.resolve().parent.parent / "blobs"
    if text is None or (path.is_symlink() and path.resolve().parent != blobs):
        return None
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    lines = [line for line in _FRONT.sub("", text).splitlines() if line.strip() and line not in form]
    return text if any(not line.startswith(("### Framework versions", "- PEFT ")) for line in lines) else None


# --- plan and run ------------------------------------------------------------------------------------


def plan_of(adapter: Adapter) -> RankPlan | None:
    """Return the plan.json in or beside the adapter's folder, if its ranks are those of the tensors."""
    held = {update.name: update.rank for update in every(adapter)}
    for folder in (adapter.folder, adapter.folder.resolve().parent):
        try:
            plan = RankPlan.load(folder / "plan.json")
        except RankwiseError:
            continue
        if {name: rank for name, rank in plan.ranks.items() if rank} == held:
            return plan
    return None


def run_of(adapter: Adapter) -> dict[str, Any] | None:
    """Return what the records of the adapter's run say; None where there are none.

    They lie one folder up; what `rankwise auto` handed out is looked for in its results, by its bytes.
    Records that cannot be read give `{"damaged": True}`.
    """
    home = adapter.folder.resolve().parent
    try:
        if (home / "answer.json").is_file():
            home = _handed_out(home, adapter) or home
        if not (home / "result.json").is_file() or not (home / "config.json").is_file():
            return None
        return _told(home)
    except (RankwiseError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return {"damaged": True}


def _handed_out(home: Path, adapter: Adapter) -> Path | None:
    study = read_json(home / "answer.json", ("study",), "")["study"]
    for result in sorted((home / "results" / study / "runs").glob("*/result.json")):
        weights = result.parent / "adapter" / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file() and weights.stat().st_size == adapter.size:
            if weights.read_bytes() == (adapter.folder / SAFETENSORS_WEIGHTS_NAME).read_bytes():
                return result.parent
    return None


def _told(home: Path) -> dict[str, Any]:
    """Return a run's facts; raises what `run_of` catches where they are not as rankwise writes them."""
    record = read_json(home / "result.json", ("run_id", "run_info", "train_info", "meta_info"), "")
    config = RunConfig.model_validate(read_json(home / "config.json", ("role",), ""))
    done, about = record["train_info"], record["meta_info"]
    split = "validation" if config.role == "tuning" else "test"
    results, arm = _study_of(home, record["run_id"])
    base = {key: str(about["model_info"][key]) for key in ("source", "fingerprint")}
    sources.parse(base["source"])
    return {
        "damaged": False,
        "id": str(record["run_id"]),
        "arm": str(arm or record["run_info"]["experiment_name"]),
        "config": config,
        "split": split,
        "loss": float(done["metrics"][f"{split}_loss"]),
        "steps": int(done["steps"]),
        "tokens": int(done["train_tokens"]),
        "packages": {str(name): str(version) for name, version in about["package_info"].items()},
        "base": base,
        "notices": [str(notice) for notice in about["model_info"]["notices"]],
        "data": _data(about["dataset_info"], int(done["metrics"][f"{split}_examples"])),
        "study": None if results is None else _study(results, str(arm), split),
    }


def _data(about: Mapping[str, Any], scored: int) -> dict[str, Any]:
    text = str(about["source"])
    source = sources.parse(text)
    return {
        "shown": shown_source(source),
        "hub": hub_id(source.name) if source.scheme == "hf" else None,
        "sha256": source.sha256,
        "fingerprint": str(about["fingerprint"]),
        "notice": datacard.licence(text),
        "scored": scored,
    }


def _study_of(home: Path, run_id: str) -> tuple[Results | None, str | None]:
    """Return the study that the run's folder lies in, and what it calls the run's arm."""
    study = home.parent.parent
    if home.parent.name != "runs" or not (study / "study.json").is_file():
        return None, None
    results = Results(Store(study.parent, study.name))
    arm = next((run["arm"] for run in results.index["runs"] if run["run_id"] == run_id), None)
    return (None, None) if arm is None else (results, arm)


def _study(results: Results, arm: str, split: str) -> dict[str, Any]:
    """Return what the study says of the arm, and the sentence that its report opens with."""
    from rankwise.recommend import recommend
    from rankwise.report import opening  # the room loads matplotlib

    losses = list(results.losses(arm).values()) if split == "test" else []
    return {
        "name": results.config.name,
        "seeds": len(losses),
        "mean": sum(losses) / len(losses) if losses else None,
        "untouched": results.untouched_metrics().get(f"{split}_loss"),
        "verdict": recommend(results).sentence() if results.config.ladders else opening.opening(results),
        "state": opening.state(results),
    }
