"""The engine's parts beside their plain references: attention, loss, LoRA, norms, packs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import lora_layers
from rankwise.engine import attention, elementwise, lora, loss, packing
from rankwise.engine.batches import packs
from tests.parts import hand_rows
from tests.zoo import PACKABLE, llama


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def near(a: torch.Tensor, b: torch.Tensor, share: float = 1e-5) -> bool:
    return bool((a - b).norm() <= share * b.norm() + 1e-12) and a.shape == b.shape


# --- packs ----------------------------------------------------------------------------------------


def alike(count: int, beginning: int) -> list:
    rows = hand_rows(count, shortest=30, longest=60)
    head = rows[0].input_ids[:beginning]
    return [dataclasses.replace(r, input_ids=np.r_[head, r.input_ids[beginning:]]) for r in rows]


def seen(pack: packing.Pack, tensor: torch.Tensor, span: packing.Span, dim: int) -> torch.Tensor:
    """What a span sees of a tensor along the token axis: the beginning, then itself."""
    own = tensor.narrow(dim, span.start, span.length)
    return torch.cat((tensor.narrow(dim, 0, span.before), own), dim)


def test_a_pack_lays_rows_end_to_end():
    rows = hand_rows(3)
    pack = packing.pack(rows)
    lengths = [len(row.input_ids) for row in rows]
    assert pack.shared == 0 and pack.ids[0].tolist() == [int(i) for r in rows for i in r.input_ids]
    assert pack.positions[0].tolist() == [i for n in lengths for i in range(n)]
    assert [(s.start, s.length, s.before) for s in pack.spans] == [
        (sum(lengths[:i]), n, 0) for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("beginning", [8, 12, 29])
def test_what_all_rows_begin_with_is_there_once(beginning):
    rows = alike(4, beginning)
    pack = packing.pack(rows)
    assert pack.shared == beginning
    assert pack.tokens == sum(len(r.input_ids) for r in rows) - 3 * beginning
    for span, row in zip(pack.spans[1:], rows, strict=True):
        assert seen(pack, pack.ids[0], span, 0).tolist() == row.input_ids.tolist()
        assert seen(pack, pack.positions[0], span, 0).tolist() == list(range(len(row.input_ids)))
    for place, target, owner in zip(pack.where, pack.targets, pack.rows, strict=True):
        row, position = rows[int(owner)], int(pack.positions[0, place])
        assert row.labels[position + 1] == target and (pack.ids[0, place] == row.input_ids[position]).all()
    assert len(pack.where) == sum(int((r.labels[1:] != -100).sum()) for r in rows)


def test_a_short_beginning_is_not_shared_and_every_row_keeps_a_token():
    assert packing.pack(alike(3, 7)).shared == 0
    same = [hand_rows(1, shortest=30, longest=30)[0]] * 3
    assert packing.pack(same).shared == 29 and packing.pack(same[:1]).shared == 0
    assert packing.pack(same, share=False).shared == 0


def test_seen_by_all_and_its_transpose():
    pack = packing.pack(alike(4, 12))
    x = torch.randn(2, pack.tokens, 3, dtype=torch.float64)
    out = pack.seen_by_all(x, 1)
    assert torch.equal(out, torch.cat([seen(pack, x, span, 1) for span in pack.spans], 1))
    g = torch.randn_like(out)
    assert (g * out).sum().item() == pytest.approx((pack.gathered(g, 1) * x).sum().item())


@pytest.mark.parametrize("limit", [1, 80, 200, 10_000])
def test_packs_keep_the_bound_and_every_row_once(limit):
    rows = hand_rows(50, seed=2)
    bins = packs(rows, limit)
    assert sorted(r.row_hash for b in bins for r in b) == sorted(r.row_hash for r in rows)
    sizes = [sum(len(r.input_ids) for r in b) for b in bins]
    assert all(size <= limit or len(b) == 1 for size, b in zip(sizes, bins, strict=True))
    assert len(bins) <= max(len(rows) if limit == 1 else 0, 2 * sum(sizes) / limit + 1)
    assert [[r.row_hash for r in b] for b in packs(rows[::-1], limit)] == [
        [r.row_hash for r in b] for b in bins
    ]


# --- attention ------------------------------------------------------------------------------------


def qkv(pack: packing.Pack, heads: int = 6, groups: int = 3, size: int = 8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [heads, heads // groups, heads // groups]
    return [torch.randn(1, h, pack.tokens, size, generator=draw).requires_grad_() for h in shapes]


def by_hand(
    pack: packing.Pack, q: Any, k: Any, v: Any, scale: float, window: int | None, cap: float | None
) -> Any:
    """Attention over the whole pack with one mask, written out from who may see whom."""
    owner = torch.cat([torch.full((s.length,), i) for i, s in enumerate(pack.spans)])
    place, at = torch.arange(pack.tokens), pack.positions[0]
    same = (owner[:, None] == owner[None, :]) | (place[None, :] < pack.shared)
    sees = same & (at[None, :] <= at[:, None])
    if window is not None:
        sees &= at[:, None] - at[None, :] < window
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kept", [0, 512], ids=["remade", "kept"])
@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("beginning", [0, 20])
def test_attention_is_the_one_written_out(kept, window, cap, beginning, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "KEPT", kept)
    monkeypatch.setattr(attention, "BLOCK", 16)
    pack = packing.pack(alike(3, beginning))
    assert pack.shared == beginning
    q, k, v = qkv(pack)
    attention.use(pack)
    draw, results = torch.randn(1, pack.tokens, 6, 8, generator=torch.Generator().manual_seed(3)), []
    ways = {
        "ours": lambda: attention.packed_attention(
            None, q, k, v, None, scaling=0.3, sliding_window=window, softcap=cap
        )[0],
        "rows": lambda: attention.by_rows(q, k, v, pack, 0.3, 0.0, window, cap),
        "hand": lambda: by_hand(pack, q, k, v, 0.3, window, cap),
    }
    if cap is None:  # a GPU's way, which knows no cap
        ways = {"whole": lambda: attention.at_once(q, k, v, pack, 0.3, 0.0, window), **ways}
    for way in ways.values():
        out = way()
        results.append((out, *torch.autograd.grad(out, (q, k, v), draw)))
    for other in results[:-1]:
        assert all(near(a, b) for a, b in zip(other, results[-1], strict=True))


def test_attention_dropout_drops():
    pack = packing.pack(alike(2, 0))
    attention.use(pack)
    q, k, v = qkv(pack)
    torch.manual_seed(0)
    dropped = attention.packed_attention(None, q, k, v, None, dropout=0.5)[0]
    assert not near(dropped, attention.packed_attention(None, q, k, v, None)[0], 0.1)


# --- loss -----------------------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 1.5},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 1000], ids=lambda c: f"chunk{c}")
def test_chunked_loss_is_full_cross_entropy(kind, chunk, monkeypatch: pytest.MonkeyPatch):
    draw = torch.Generator().manual_seed(0)
    weight, settings = torch.randn(50, 8, generator=draw), dict(HEADS[kind])
    bias = torch.randn(50, generator=draw) if settings.pop("bias", False) else None
    head = loss.Head(weight, bias, **settings)
    monkeypatch.setattr(loss, "CHUNK_BYTES", chunk * 4 * 50)
    hidden = torch.randn(17, 8, generator=draw).requires_grad_()
    targets, upstream = torch.randint(0, 50, (17,), generator=draw), torch.rand(17, generator=draw)
    wanted = loss.plain_loss(hidden, head, targets)
    found, correct = loss.chunked_loss(hidden, head, targets)
    assert near(found, wanted) and torch.equal(correct, head.logits(hidden).argmax(-1) == targets)
    slopes = [torch.autograd.grad(x, hidden, upstream)[0] for x in (found, wanted)]
    assert near(*slopes)
    with torch.no_grad():
        assert near(loss.chunked_loss(hidden, head, targets)[0], wanted)


def test_the_loss_of_a_sure_model_and_of_a_hopeless_one():
    head = loss.Head(torch.tensor([[300.0], [-300.0], [0.0]]))
    hidden = torch.tensor([[1.0], [1.0], [1.0]])
    losses, correct = loss.chunked_loss(hidden, head, torch.tensor([0, 1, 2]))
    assert losses.tolist() == [0.0, 600.0, 300.0] and correct.tolist() == [True, False, False]


def test_a_small_loss_beside_large_logits_keeps_its_digits():
    head = loss.Head(torch.tensor([[110.0], [100.0]]))
    found, _ = loss.chunked_loss(torch.ones(1, 1), head, torch.tensor([0]))
    assert found.item() == pytest.approx(4.5399e-5, rel=1e-3)


def test_full_logits_are_never_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2 * 4 * 1000)
    largest = 0
    own = torch.softmax

    def watch(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return own(x, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", watch)
    loss.chunked_loss(torch.randn(64, 4), loss.Head(torch.randn(1000, 4)), torch.zeros(64, dtype=torch.long))
    assert largest == 2000


@pytest.mark.parametrize("family", PACKABLE)
def test_head_of_every_family(family):
    model = PACKABLE[family]()
    ids = torch.arange(12)[None]
    trunk = getattr(model, model.base_model_prefix)
    assert near(
        loss.head_of(model).logits(trunk(input_ids=ids).last_hidden_state), model(input_ids=ids).logits
    )


# --- LoRA -----------------------------------------------------------------------------------------


class Three(nn.Module):
    """Three maps of one input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = {
            "linear": lambda o: nn.Linear(6, o, bias=False),
            "bias": lambda o: nn.Linear(6, o),
            "conv1d": lambda o: Conv1D(o, 6),
        }[kind]
        self.a, self.b, self.c = make(5), make(7), make(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.a(x), self.b(x), self.c(x)


def wrapped(kind: str = "linear", **options: Any) -> Any:
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["a", "b", "c"], "rank_pattern": {"b": 3, "c": 1}}
    model = get_peft_model(Three(kind), LoraConfig(**settings | options, fan_in_fan_out=kind == "conv1d"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    return model


def results(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    outputs = model(x)
    total = sum((out * torch.arange(1.0, out.shape[-1] + 1)).sum() * (i + 1) for i, out in enumerate(outputs))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [*outputs, *torch.autograd.grad(total, [x, *parameters])]


@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d"])
@pytest.mark.parametrize("groups", [[["a", "b", "c"]], [["a"], ["b", "c"]], [["b", "c"]]])
def test_a_fused_group_is_pefts_forward(kind, groups):
    model = wrapped(kind)
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    wanted = results(model, x)
    with lora.fused(model, groups) as left:
        assert sorted(left) == sorted({"a", "b", "c"} - {n for g in groups for n in g})
        for _ in range(2):  # nothing is left over from the first time
            assert all(near(a, b) for a, b in zip(results(model, x), wanted, strict=True))
        other = x.detach() * 2
        assert near(model.base_model.model.b(other), model.base_model.model.b(other.clone()))
    assert not any("forward" in vars(layer) for layer in lora_layers(model).values())


def test_an_input_without_gradient_gets_none():
    model, x = wrapped(), torch.randn(3, 6)
    with lora.fused(model, [["a", "b", "c"]]):
        model(x)[0].sum().backward()
    assert x.grad is None and lora_layers(model)["a"].lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.1}], ids=str)
def test_what_is_not_plain_lora_keeps_pefts_forward(options):
    model = wrapped("bias", **options)
    with lora.fused(model, [["a", "b", "c"]]) as left:
        assert sorted(left) == ["a", "b", "c"]


def test_modules_with_one_input_are_found():
    groups = lora.same_input_groups(llama())
    per_layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [[n.split(".")[-1] for n in group] for group in groups] == [*per_layer * 3, ["lm_head"]]


# --- norms and rotary positions -------------------------------------------------------------------


class OddRMSNorm(LlamaRMSNorm):
    """Looks like one and is another function."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.01


def test_only_what_is_known_is_replaced_and_all_comes_back():
    model = llama()
    model.model.norm = OddRMSNorm(32).requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    with elementwise.lean(model) as replaced:
        norms = {name for name, m in model.named_modules() if "RMSNorm" in type(m).__name__}
        mlps = {f"model.layers.{i}.mlp" for i in range(3)}
        left = {"model.norm", "model.layers.0.input_layernorm"}
        assert set(replaced) == (norms - left) | mlps | {"transformers.models.llama.modeling_llama"}
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_broken_model_does_not_slow_the_next_of_its_class(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(elementwise, "_KNOWN", {})
    broken, sound = llama(), llama()
    for parameter in broken.parameters():
        parameter.fill_(float("nan"))
    with elementwise.lean(broken) as replaced:
        assert not any("norm" in name or "mlp" in name for name in replaced)
    with elementwise.lean(sound) as replaced:
        assert any("norm" in name for name in replaced) and any("mlp" in name for name in replaced)


@pytest.mark.parametrize("family", PACKABLE)
def test_lean_parts_give_the_models_logits(family):
    model, ids = PACKABLE[family](), torch.arange(40)[None]
    wanted = model(input_ids=ids).logits
    with elementwise.lean(model) as replaced:
        assert near(model(input_ids=ids).logits, wanted)
    assert bool(replaced) == (family not in {"gpt2", "opt"})
