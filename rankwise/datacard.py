"""The data card: what the prepared data are, in figures, without a word of the data.

`card` computes, `draw` draws, `write_card` writes. The same input gives the same bytes: no times, no
paths of this machine, no program versions inside the picture.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from rankwise.aside import replacing
from rankwise.data import Example, Prepared
from rankwise.errors import RankwiseError
from rankwise.markdown import prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 50  # lines of a list in card.md; card.json has all of them
STEPS_PER_OCTAVE = 4  # bins of the length histogram: each is 2^(1/4) = 1.19 times as wide as the last

NON_COMMERCIAL = (
    "Alpaca-style rows, written by another company's language model: for non-commercial use. The file is "
    "fetched by each user and is not redistributed."
)


def write_card(
    prepared: Prepared,
    *,
    name: str,
    source: str,
    sha256: str,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> Path:
    """Write `card.json`, `token_lengths.png` and `card.md` into `folder`.

    Args:
        prepared: What `data.prepare` returned.
        name: The data's name, for the heading.
        source: Where the file came from, as the study names it.
        sha256: Of the file, hexadecimal; empty if not known.
        max_length: Tokens at which examples were cut.
        tokenizer: The one that `prepared` was made with.
        folder: Made if it is missing; each file is replaced in one step.

    Returns:
        The path of `card.md`.

    Raises:
        RankwiseError: The folder cannot be written, or `max_length` is not the one of `prepared`.

    Cost: about 1 s, most of it the import of matplotlib.
    """
    facts = card(
        prepared, name=name, source=source, sha256=sha256, max_length=max_length, tokenizer=tokenizer
    )
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
    path = folder / "card.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "card.json", lambda aside: aside.write_text(text, encoding="utf-8"))
        _replace(folder / "token_lengths.png", lambda aside: draw(facts, aside))
        _replace(path, lambda aside: aside.write_text(markdown(facts), encoding="utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise RankwiseError(f"The data card cannot be written to {folder}: {why}.") from error
    return path


def card(
    prepared: Prepared,
    *,
    name: str,
    source: str,
    sha256: str,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Compute every figure of the card; arguments as for `write_card`.

    Returns:
        What `card.json` holds: plain numbers, strings and lists. Shares are 0 to 1, lengths are tokens.

    Raises:
        RankwiseError: `max_length` is not the one of `prepared`.
    """
    if max_length != prepared.max_length:
        raise RankwiseError(
            f"The data were cut at {prepared.max_length} tokens; got max_length {max_length}."
        )
    splits = vars(prepared.splits)
    examples = [example for split in splits.values() for example in split]
    prompt = np.array([example.prompt_tokens for example in examples], dtype=np.int64)
    kept = np.array([example.response_tokens for example in examples], dtype=np.int64)
    lost = np.array([example.cut_tokens for example in examples], dtype=np.int64)
    lengths = {"prompt": prompt, "response, before the cut": kept + lost, "response, kept": kept,
               "row, before the cut": prompt + kept + lost, "row, kept": prompt + kept}  # fmt: skip
    return {
        "name": name,
        "source": source,
        "sha256": sha256,
        "licence": licence(source),
        "fingerprint": prepared.fingerprint,
        "rankwise": _version(),
        "tokenizer": _tokenizer_name(tokenizer),
        "prompt_form": prepared.prompt_form,
        "max_length": max_length,
        "notices": list(prepared.notices),
        "train": prepared.train,
        "rows": {
            "read": prepared.rows_read,
            "kept": len(examples),
            "with_input": prepared.with_input,
            "share_with_input": _share(prepared.with_input, len(examples)),
        },
        "splits": [_split_facts(split, rows) for split, rows in splits.items()],
        "tokens": [[label, _stats(values)] for label, values in lengths.items()],
        "cut": {
            "rows": int((lost > 0).sum()),
            "share_of_rows": _share((lost > 0).sum(), len(examples)),
            "tokens": int(lost.sum()),
            "share_of_response_tokens": _share(lost.sum(), (kept + lost).sum()),
        },
        "vocabulary": _vocabulary(examples, tokenizer),
        "histogram": _histogram(prompt, kept + lost),
        "fits": _fits(prompt + kept + lost, max_length),
        "duplicates": [list(pair) for pair in prepared.duplicates],
        "rejected": [[reject.line, reject.reason] for reject in prepared.rejected],
    }


def licence(source: str) -> str:
    """Return what is known of the licence of a source, or an empty string."""
    return NON_COMMERCIAL if "llamafactory" in source.lower() and "alpaca" in source.lower() else ""


def markdown(facts: dict[str, Any]) -> str:
    """Render `card`'s facts as Markdown in which no string can be markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rankwise"),
        finalize=lambda value: prose(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template("card.md.j2").render(card=facts, shown=SHOWN, n=_number, pct=_percent)


def draw(facts: dict[str, Any], path: Path) -> None:
    """Draw the lengths of prompts and responses, and how many rows fit into which length, as PNG."""
    import matplotlib.figure
    import matplotlib.style
    import matplotlib.ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    bins, fits, limit = facts["histogram"], facts["fits"], facts["max_length"]
    # The user's own settings would change the bytes.
    with matplotlib.style.context("default"):
        figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for part, colour in (("prompt", "#0072b2"), ("response", "#d55e00")):
            if not any(bins[part]):
                continue
            left.stairs(bins[part], bins["edges"], color=colour, fill=True, alpha=0.25)
            left.stairs(bins[part], bins["edges"], color=colour, label=part, linewidth=1.5)
        left.set(xlabel="tokens, before the cut", ylabel="rows", title="How long the parts are")
        if left.patches:
            left.legend(frameon=False)
        right.step(fits["length"], fits["share"], where="post", color="#333333", linewidth=1.5)
        right.axvline(limit, color="#009e73", linestyle="--", linewidth=1.5)
        right.set(xlabel="tokens in a row", ylabel="rows that fit", title="What a maximum length keeps whole")
        right.set_ylim(0, 1.02)
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        whole = 1 - facts["cut"]["share_of_rows"]
        # On the side of the line where there is room for it.
        side: Any = "right" if limit > fits["length"][-1] / 2 else "left"
        label = f" {limit:,} tokens: \n {whole:.1%} whole "
        right.annotate(label, (limit, 0.04), ha=side, color="#00664b")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


def _split_facts(name: str, examples: tuple[Example, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "rows": len(examples),
        "tokens": sum(len(example.input_ids) for example in examples),
        "response_tokens": sum(example.response_tokens for example in examples),
        "response_bytes": sum(example.response_bytes for example in examples),
        "rows_cut": sum(example.cut_tokens > 0 for example in examples),
    }


def _stats(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "p95", "max"), 0.0)
    named = {"min": values.min(), "median": np.median(values), "mean": values.mean(),
             "p95": np.percentile(values, 95), "max": values.max()}  # fmt: skip
    return {name: round(float(value), 1) for name, value in named.items()}


def _vocabulary(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for example in examples:
        np.add.at(counts, example.input_ids, 1)
    seen, unknown = int((counts > 0).sum()), tokenizer.unk_token_id
    # GPT-2's token for unknown text is its end-of-text token, which occurs in every row.
    other = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    share = None if unknown is None or unknown in other else _share(counts[unknown], counts.sum())
    return {"size": len(counts), "seen": seen, "share": _share(seen, len(counts)), "unknown_share": share}


def _histogram(prompt: np.ndarray, response: np.ndarray) -> dict[str, list[Any]]:
    prompt = prompt[prompt > 1]  # the first token of plain text has nothing before it, but is no prompt
    both = np.concatenate([prompt, response])
    both = both[both > 0] if (both > 0).any() else np.ones(1)
    octaves = int(np.ceil(np.log2(both.max()))) + 1
    # Whole tokens only: edges that fall between the same two integers would leave empty bins.
    edges = np.unique(np.ceil(2.0 ** (np.arange(octaves * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)))
    first = np.searchsorted(edges, both.min(), side="right") - 1
    last = np.searchsorted(edges, both.max(), side="right")
    edges = edges[first : last + 1]
    return {
        "edges": edges.astype(int).tolist(),
        "prompt": np.histogram(prompt, edges)[0].tolist(),
        "response": np.histogram(response, edges)[0].tolist(),
    }


def _fits(lengths: np.ndarray, limit: int) -> dict[str, list[Any]]:
    """The share of rows no longer than each of some 200 lengths, `limit` among them."""
    at = np.unique(lengths)
    if len(at) > 200:
        at = at[np.unique(np.linspace(0, len(at) - 1, 200).astype(int))]
    at = np.union1d(at, [limit])
    share = np.searchsorted(np.sort(lengths), at, side="right") / max(1, len(lengths))
    return {"length": at.tolist(), "share": [round(float(x), 6) for x in share]}


def _share(part: Any, whole: Any) -> float:
    return round(float(part) / float(whole), 6) if whole else 0.0


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    # A local path would name this machine's folders and its user.
    name = str(tokenizer.name_or_path or "")
    local = PurePath(name).is_absolute() or name.startswith((".", "~"))
    return (PurePath(name).name if local else name) or type(tokenizer).__name__


def _version() -> str:
    try:
        return importlib.metadata.version("rankwise")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    with replacing(path) as aside:
        write(aside)
