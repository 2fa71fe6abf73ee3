"""Probes against autograd on the weights themselves; what they leave behind, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rankwise import probes
from rankwise.data import NO_LOSS, Example
from rankwise.engine import proof
from rankwise.engine.paths import Plain
from rankwise.engine.plain import score
from rankwise.errors import RankwiseError
from rankwise.evidence import QUANTITIES, Evidence
from rankwise.inventory import inventory
from rankwise.probes.gradients import Sums
from rankwise.probes.spectra import CO_RANGE, RANGE, gaussian, sketched_spectrum, spectrum
from rankwise.probes.watch import still, sweep, watching
from tests import zoo
from tests.conftest import tiny_llama
from tests.parts import hand_rows

FAMILIES = ["llama", "gpt2", "gemma", "olmo"]


def rows_alike(count: int = 5, seed: int = 0) -> list[Example]:
    """Rows that begin with the same 12 tokens, as those of a chat template do."""
    beginning = np.arange(40, 52, dtype=np.int32)
    return [
        replace(
            row,
            input_ids=np.concatenate([beginning, row.input_ids]),
            labels=np.concatenate([np.full(12, NO_LOSS, np.int32), row.labels]),
        )
        for row in hand_rows(count, seed=seed)
    ]


ROWS = rows_alike()


def engines(model: Any) -> dict[str, Any]:
    with still(model):  # no path packs a model whose weights want gradients
        found = {"plain": Plain(), "packed": proof.choose(model)}
    assert found["packed"].name == "packed"
    return found


def autograd(model: Any, rows: list[Example]) -> dict[str, torch.Tensor]:
    """Module -> gradient (out, in) of the mean loss per label token, by the plainest way there is."""
    modules = inventory(model)
    weights = [model.get_submodule(module.name).weight for module in modules]
    for weight in weights:
        weight.requires_grad_(True)
    labels = sum(int((row.labels[1:] != NO_LOSS).sum()) for row in rows)
    loss = torch.stack([score(model, [row]).nll.sum() for row in rows]).sum() / labels
    found = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {m.name: (g.t() if m.conv1d else g) for m, g in zip(modules, found, strict=True)}


def probe(kind: str, model: Any, rows: list[Example] = ROWS, **settings: Any) -> Evidence:
    settings = {"engine": Plain(), "micro_tokens": 120} | settings
    return probes.evidence(kind, model, settings.pop("inventory", inventory(model)), rows, **settings)


def same(a: Evidence, b: Evidence) -> bool:
    return all(
        np.array_equal(array, b.of(quantity)[name])
        for quantity, found in a.values.items()
        for name, array in found.items()
    )


def changed(row: Example, **arrays: Any) -> Example:
    return replace(row, **{name: np.asarray(value, dtype=np.int32) for name, value in arrays.items()})


@pytest.mark.parametrize("path", ["plain", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_importance_and_fisher_equal_autograd(family: str, path: str) -> None:
    model = zoo.PACKABLE[family]()
    engine = engines(model)[path]
    wanted, each = autograd(model, ROWS), [autograd(model, [row]) for row in ROWS]
    gradients = probe("gradients", model, engine=engine)
    importance = probe("importance", model, engine=engine).of("mean_absolute")
    fisher = probe("fisher", model, engine=engine).of("mean_square")
    assert set(gradients.values) == set(QUANTITIES["gradients"])
    for module in inventory(model):
        name, gradient = module.name, wanted[module.name]
        values = torch.linalg.svdvals(gradient)
        found = torch.from_numpy(gradients.of("singular_values")[name])
        right = torch.from_numpy(gradients.of("right_vectors")[name])
        assert torch.allclose(found, values, rtol=1e-4, atol=1e-4 * float(values[0])), name
        assert torch.allclose((gradient @ right.t()).norm(dim=0), values, atol=1e-4 * float(values[0])), name
        assert torch.allclose(right @ right.t(), torch.eye(len(right)), atol=1e-4), name
        assert float(gradients.of("norm")[name]) == pytest.approx(float(gradient.norm()), rel=1e-4)
        weight = model.get_submodule(name).weight
        product = gradient * (weight.t() if module.conv1d else weight)
        assert float(importance[name]) == pytest.approx(float(product.abs().mean()), rel=1e-4)
        square = torch.stack([one[name].square().mean() for one in each]).mean()
        assert float(fisher[name]) == pytest.approx(float(square), rel=1e-4)


@pytest.mark.parametrize("kind", ["gradients", "importance"])
def test_groups_of_modules_give_what_one_pass_gives(kind: str) -> None:
    model = zoo.gpt2()
    heard: list[tuple[int, int]] = []
    whole = probe(kind, model, options={"method": "exact"})
    parts = probe(
        kind, model, options={"method": "exact", "allowance": 20_000},
        on_progress=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    tokens = sum(len(row.input_ids) for row in ROWS)
    assert whole.cost.passes == 1 and whole.cost.forward_tokens == whole.cost.backward_tokens == tokens
    assert parts.cost.passes > 3 and parts.cost.forward_tokens == parts.cost.passes * tokens
    assert tokens < parts.cost.backward_tokens < parts.cost.forward_tokens  # only down to each group
    assert heard[-1] == (parts.cost.forward_tokens, parts.cost.forward_tokens)
    for quantity, found in whole.values.items():
        if quantity != "right_vectors":  # near-equal singular values may share their directions otherwise
            for name, array in found.items():
                np.testing.assert_allclose(parts.of(quantity)[name], array, rtol=1e-3, atol=1e-6)


def test_backward_stops_below_the_lowest_watched_module() -> None:
    model = zoo.llama()
    wants: dict[int, set[bool]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, index=index: wants.setdefault(index, set()).add(
                output.requires_grad
            )
        )
    probe("gradients", model, inventory=inventory(model).select(r"model\.layers\.1\..*"))
    assert wants == {0: {False}, 1: {True}, 2: {True}}


def test_half_precision_is_summed_in_single() -> None:
    sums = Sums(lambda module, gradient: {"whole": gradient}, {"one": torch.zeros(8, 6)})
    draw = torch.Generator().manual_seed(0)
    wanted = torch.zeros(8, 6, dtype=torch.float64)
    for _ in range(400):
        x, g = (torch.rand(3, n, generator=draw).bfloat16() for n in (6, 8))
        wanted += g.double().t() @ x.double()
        sums.add("one", x, g)
    assert torch.allclose(sums.found["one"].double(), wanted, rtol=1e-5)


# sketches and randomised spectra


def falling(out_features: int, in_features: int, power: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose k-th singular value is k^-power."""
    draw = torch.Generator().manual_seed(seed)
    count = min(out_features, in_features)
    u = torch.linalg.qr(torch.randn(out_features, count, generator=draw)).Q
    v = torch.linalg.qr(torch.randn(in_features, count, generator=draw)).Q
    return (u * torch.arange(1, count + 1) ** -power) @ v.t()


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_randomised_spectrum_finds_the_largest(shape: tuple[int, int]) -> None:
    matrix = falling(*shape, power=0.8)
    values, right, norm = spectrum(matrix, seed=1)
    assert float(norm) == pytest.approx(float(matrix.norm()), rel=1e-5)
    wanted = torch.arange(1, 65) ** -0.8
    assert values.shape == (64,) and right.shape == (64, shape[1])
    assert torch.allclose(values[:16], wanted[:16], rtol=1e-3)
    assert torch.allclose(values, wanted, rtol=0.05)
    assert torch.allclose(right @ right.t(), torch.eye(64), atol=1e-4)


@pytest.mark.parametrize(("power", "near"), [(1.0, 0.06), (2.0, 0.01)])
def test_a_sketch_is_near_and_not_too_large_on_average(power: float, near: float) -> None:
    ratios = []
    for seed in range(8):
        matrix = falling(400, 600, power, seed)
        omega, psi = gaussian(600, RANGE, seed, "a"), gaussian(CO_RANGE, 400, seed, "b")
        found = sketched_spectrum(matrix @ omega, psi @ matrix, psi)
        ratios.append(found.values[:12] / torch.arange(1, 13) ** -power)
        assert float(found.norm) == pytest.approx(float(matrix.norm()), rel=near)
    mean = torch.stack(ratios).mean(0)
    assert torch.all((mean - 1).abs() < near), mean


def wide_llama(layers: int = 1) -> Any:
    model = tiny_llama()
    config = type(model.config)(
        **(
            model.config.to_dict()
            | {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": layers}
        )
    )
    torch.manual_seed(0)
    return type(model)(config).requires_grad_(False).eval()


def test_a_sketched_gradient_of_few_tokens_is_the_exact_one_and_repeats() -> None:
    model = wide_llama()
    engine = engines(model)["packed"]
    rows = hand_rows(3, shortest=10, longest=16)
    assert sum(len(row.input_ids) for row in rows) < RANGE  # so no gradient has a higher rank than the sketch
    exact = probe("gradients", model, rows, engine=engine, micro_tokens=20, options={"method": "exact"})
    first, again, other = (
        probe(
            "gradients", model, rows, engine=engine, micro_tokens=20, options={"method": "sketch"}, seed=seed
        )
        for seed in (3, 3, 4)
    )
    assert first.about["method"] == "sketch" and same(first, again) and not same(first, other)
    down = "model.layers.0.mlp.down_proj"
    assert len(first.of("singular_values")[down]) < len(exact.of("singular_values")[down]) == 64
    for name, values in exact.of("singular_values").items():
        near = {"rtol": 1e-2, "atol": 2e-3 * values[0], "err_msg": name}
        np.testing.assert_allclose(first.of("singular_values")[name][:16], values[:16], **near)
        right = first.of("right_vectors")[name][:1] @ exact.of("right_vectors")[name][:1].T
        assert abs(float(right[0, 0])) > 0.999
        assert float(first.of("norm")[name]) == pytest.approx(float(exact.of("norm")[name]), rel=1e-3)


def test_auto_sketches_where_one_pass_cannot_hold_all() -> None:
    model = zoo.llama()
    assert probe("gradients", model, options={"allowance": 10_000}).about["method"] == "sketch"
    assert probe("gradients", model).about["method"] == "exact"


# memory


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that live at once, above those that live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def test_streaming_holds_no_more_than_its_allowance() -> None:
    model, rows = wide_llama(layers=6), hand_rows(4, shortest=16, longest=24)
    whole = sum(4 * m.in_features * m.out_features for m in inventory(model))

    def bare() -> None:
        with still(model), watching(model, inventory(model).names, lambda name, x, g: None):
            sweep(model, Plain(), [rows], [1], lambda batch: None)

    def exact(allowance: int) -> None:
        options = {"method": "exact", "allowance": allowance}
        probe("gradients", model, rows, micro_tokens=1000, options=options)

    allowance = whole // 6
    floor = peak_bytes(bare)
    assert peak_bytes(lambda: exact(whole)) > 0.9 * whole
    reducing = 4_000_000  # the spectrum of one matrix
    assert peak_bytes(lambda: exact(allowance)) - floor < allowance + reducing < 0.5 * whole


# the model is left alone


def state(model: Any) -> list[Any]:
    hooks = [
        len(getattr(m, name))
        for m in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    return [
        [(n, p.requires_grad, p.grad is None, p.device, p.dtype) for n, p in model.named_parameters()],
        [m.training for m in model.modules()],
        ["forward" in vars(m) for m in model.modules()],
        hooks,
        model.config._attn_implementation,
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]


class Stop(Exception):
    pass


def stop(done: int, total: int) -> None:
    raise Stop


@pytest.mark.parametrize("path", ["plain", "packed"])
@pytest.mark.parametrize("kind", ["gradients", "importance", "fisher"])
def test_the_model_is_as_it_was(kind: str, path: str) -> None:
    model = tiny_llama().train()  # as a user has it: every weight wants a gradient
    model.model.layers[1].eval()
    model.lm_head.register_forward_hook(lambda *_: None)
    engine = engines(model)[path]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = state(model)
    with torch.no_grad():  # a caller's; the probe needs gradients all the same
        found = probe(kind, model, engine=engine)
    with pytest.raises(Stop):
        probe(kind, model, engine=engine, on_progress=stop)
    assert state(model) == before
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert all(np.all(array > 0) for array in found.of(next(iter(found.values))).values())


# refusals


def test_refusals_say_what_to_mend() -> None:
    model = tiny_llama()
    with pytest.raises(RankwiseError, match="needs calibration rows"):
        probe("gradients", model, [])
    with pytest.raises(RankwiseError, match="gradients"):
        probe("gradient", model)
    with pytest.raises(RankwiseError, match="exact, sketch"):
        probe("gradients", model, options={"method": "fast"})
    with pytest.raises(RankwiseError, match="method and allowance; got methods"):
        probe("importance", model, options={"methods": "exact"})
    with pytest.raises(RankwiseError, match="1 or more; got 0"):
        probe("gradients", model, options={"allowance": 0})
    with pytest.raises(RankwiseError, match="no options; got method"):
        probe("fisher", model, options={"method": "exact"})
    silent = [changed(row, labels=np.full_like(row.labels, NO_LOSS)) for row in ROWS]
    for kind in ("gradients", "fisher"):
        with pytest.raises(RankwiseError, match="none of 5 rows has any"):
            probe(kind, model, silent)


def test_a_loss_that_is_not_finite_names_where() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        RankwiseError, match=r"got nan; the first bad output is of model\.layers\.1\.mlp\.up_proj"
    ):
        probe("gradients", model)


def test_importance_refuses_packed_weights() -> None:
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), False)
    with pytest.raises(RankwiseError, match=r"layers\.0\.mlp\.up_proj is a quantised Linear"):
        probe("importance", model)


def test_rows_without_labels_are_left_out() -> None:
    model = tiny_llama().requires_grad_(False)
    silent = changed(ROWS[0], labels=np.full_like(ROWS[0].labels, NO_LOSS))
    for kind in ("importance", "fisher"):
        with_it, without = probe(kind, model, [silent, *ROWS[1:]]), probe(kind, model, ROWS[1:])
        assert same(with_it, without) and with_it.about["rows"] == len(ROWS) - 1
