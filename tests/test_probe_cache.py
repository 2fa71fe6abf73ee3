"""What probes keep: a hit measures nothing and gives the same, a miss or a damaged file measures."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from rankwise.data import NO_LOSS
from rankwise.engine.paths import Plain
from rankwise.evidence import Cost, Evidence
from rankwise.inventory import inventory
from rankwise.probes import cache
from tests.conftest import tiny_llama
from tests.test_probes import ROWS, changed, probe, same


@pytest.fixture
def kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    return tmp_path / "probes"


class Counted(Plain):
    """The plain path, counting its forward passes."""

    passes = 0

    def score(self, model: Any, rows: Any) -> Any:
        self.passes += 1
        return super().score(model, rows)


def test_a_hit_passes_nothing_and_gives_the_same(kept: Any) -> None:
    model, engine = tiny_llama(), Counted()
    for kind in ("gradients", "importance", "fisher"):
        first = probe(kind, model, engine=engine, fingerprint="a")
        passes = engine.passes
        again = probe(kind, model, engine=engine, fingerprint="a", micro_tokens=60)
        assert engine.passes == passes > 0 and same(first, again) and same(again, first)
        assert again.summary() == first.summary() and again.cost.seconds > 0
    assert len(list(kept.glob("*.safetensors"))) == 3 and not list(kept.glob(".*"))


def test_whatever_decides_the_numbers_makes_a_miss(kept: Any) -> None:
    model, engine = tiny_llama(), Counted()
    last = ROWS[-1]
    unlabelled = np.where(np.arange(len(last.labels)) == len(last.labels) - 1, NO_LOSS, last.labels)
    variants: list[dict[str, Any]] = [
        {},
        {"fingerprint": "other weights"},
        {"seed": 1},
        {"options": {"method": "sketch"}},
        {"inventory": inventory(model).select("attention")},
        {"rows": [*ROWS[:-1], changed(last, input_ids=last.input_ids + 1)]},
        {"rows": [*ROWS[:-1], changed(last, labels=unlabelled)]},
        {"rows": ROWS[:-1]},
    ]
    for number, variant in enumerate(variants, 1):
        passes = engine.passes
        probe("gradients", model, **({"engine": engine, "fingerprint": "a"} | variant))
        assert engine.passes > passes, variant
        assert len(list(kept.glob("*.safetensors"))) == number
    for seed in (0, 1):  # nothing is drawn for this one, so seeds share it
        probe("fisher", model, engine=engine, fingerprint="a", seed=seed)
    assert len(list(kept.glob("*.safetensors"))) == len(variants) + 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_measured_anew(kept: Any, damage: str) -> None:
    model, engine = tiny_llama(), Counted()
    first = probe("gradients", model, engine=engine, fingerprint="a")
    (path,) = kept.glob("*.safetensors")
    whole = path.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:]
    path.write_bytes({"cut": whole[:-100], "flipped": flipped, "emptied": b""}[damage])
    passes = engine.passes
    assert same(first, probe("gradients", model, engine=engine, fingerprint="a"))
    assert engine.passes > passes
    probe("gradients", model, engine=engine, fingerprint="a")
    assert engine.passes == 2 * passes  # the file is whole again


def test_two_at_once_measure_once(kept: Any) -> None:
    measured: list[int] = []
    value = np.float32(2).reshape(())

    def measure() -> Evidence:
        measured.append(1)
        time.sleep(0.3)
        return Evidence("fisher", {"mean_square": {"m": value}}, Cost(1, 1, 1, 0.3), {"rows": 1})

    found: list[Evidence] = []
    ask = lambda: found.append(cache.kept("d", "fisher", ["m"], measure))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and len(found) == 3
    assert all(one.of("mean_square")["m"] == 2 and one.cost == Cost(1, 1, 1, 0.3) for one in found)


def test_without_a_fingerprint_nothing_is_kept(kept: Any) -> None:
    probe("fisher", tiny_llama())
    assert not kept.exists()
