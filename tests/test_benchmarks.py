"""The benchmarks' own arithmetic and plumbing; nothing here is timed against a figure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, flops, growth, throughput
from rankwise.inventory import inventory

ROOT = Path(__file__).parent.parent


def test_the_contenders_are_interleaved() -> None:
    assert common.interleaved(["a", "b"], 2) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_a_spread_is_the_median_with_its_ends() -> None:
    assert common.spread([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0}


def test_the_needed_operations_equal_a_hand_count() -> None:
    """One layer, width 4, 2 heads of size 2, 1 key-value head, MLP 6, vocabulary 10, rank 1 everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=6, vocab_size=10, tie_word_embeddings=True,
        )
    )  # fmt: skip
    modules = inventory(model).select("all").modules
    q, k, v, o, gate, up, down = 16, 8, 8, 16, 24, 24, 24
    adapters = (4 + 4) + (4 + 2) + (4 + 2) + (4 + 4) + 3 * (4 + 6)
    assert sum(m.cost for m in modules) == adapters
    shape = flops.shape_of(model, modules, adapters)
    forward = 2 * (q + k + v + o + gate + up + down)
    backward = 2 * (o + gate + up + down)  # q, k, v read the embedding, which learns nothing
    pairs = (1 + 2 + 3) + (1 + 2)  # of queries with the keys that they may see: rows of 3 and 2 tokens
    attention = 6 * 2 * 4 * pairs
    head = 2 * 2 * 10 * 4  # a label token: logits, and back to the hidden state
    expected = 5 * (forward + backward + 6 * adapters) + attention + 2 * head
    assert flops.needed(shape, [3, 2], label_tokens=2) == expected


def test_the_matrix_count_is_what_pytorch_counts() -> None:
    """PyTorch's own counter over a forward and a backward pass of one frozen map."""
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    with FlopCounterMode(display=False) as counter:
        (x @ w.T).sum().backward()
    shape = flops.Shape(frozen=24, first=0, adapters=0, vocabulary=0, width=0, queries=0, layers=0)
    assert counter.get_total_flops() == flops.needed(shape, [5], 0)


def test_the_ceiling_is_positive_and_bounds_a_share() -> None:
    found = flops.ceiling({"shapes": [(64, 32)], "seconds": 0.0})
    assert set(found) == {"fp32", "bf16"}
    best = flops.best([found, found])
    assert all(0 < value < 1e7 for value in best.values())
    one = {
        "dtype": "fp32", "path": "", "tokens": 10, "label_tokens": 5, "seconds": 2.0, "train_loss": 1.0,
        "test_loss": 1.0, "process_peak_bytes": 1, "steps": 1, "needed_flops": best["fp32"] * 1e9,
    }  # fmt: skip
    assert throughput.summarise([one], best)["share_of_ceiling"] == pytest.approx(0.5)


def test_the_ratios_take_the_best_peer() -> None:
    def side(speed: float, memory: float) -> dict[str, dict[str, float]]:
        return {"label_tokens_per_second": {"median": speed}, "peak_gb": {"median": memory}}

    found = throughput.ratios({"a": side(10, 8), "b": side(5, 8), "c": side(20, 4), "e": side(60, 2)})
    assert [(line["what"], line["ratio"]) for line in found] == [
        ("speed e/a", 6), ("speed e/c, the best of b, b32, c", 3), ("memory e/a", 0.25), ("memory e/c", 0.5)
    ]  # fmt: skip


def test_growth_measures_a_shared_point_once_and_every_axis_finds_it() -> None:
    jobs = growth.points(list(growth.AXES), full=True)
    assert all(job["rows"] * job["length"] <= 64 * 256 for job in jobs.values())
    summary = {name: {**job, "ms_per_token": {}, "peak_gb": {}} for name, job in jobs.items()}
    for axis, (_, _, points) in growth.AXES.items():
        assert len(growth.series(summary, axis)) == len(points), axis


def test_a_failing_process_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "console", SimpleNamespace(print=lambda *args, **kwargs: None))
    jobs = {"x": {"axis": "none", "model": "no such model"}}
    answers, failures = common.collect("benchmarks.growth", jobs, 1)
    assert answers == {"x": []}
    assert "KeyError" in failures[0] and "no such model" in failures[0]
    assert common.finish(failures) == 1


@pytest.mark.parametrize("name", ["throughput", "study", "growth", "probe"])
def test_each_says_how_it_is_called(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "--full" in ended.stdout and f"python -m benchmarks.{name}" in ended.stdout
