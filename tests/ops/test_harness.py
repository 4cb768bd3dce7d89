"""Every op, whatever it does: what all of them promise, on the cases of ``tests/ops/cases``.

A new family adds a module with its cases there; nothing here names an op.
"""

import dataclasses
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.calls import Event
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.integer import code_limits
from lightning_linger.core.payload import real_values
from lightning_linger.core.registry import all_ops, op_of
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.capture import flat_tensors
from lightning_linger.export.inspection import inspect_model
from lightning_linger.platforms.tflite import TFLITE
from tests.models import assert_integer_exact, train
from tests.ops import operators_table
from tests.ops.cases import ALL, Case

# weight bits, activation bits, output bits
Bits = tuple[int, int, int | None]
EIGHT, SIXTEEN = (8, 8, 8), (16, 16, 16)
QUICK: list[tuple[str, Bits]] = [
    *(("venusa", bits) for bits in (EIGHT, SIXTEEN, (4, 8, 8), (8, 16, 8), (8, 8, None))),
    *(("arcs", EIGHT), ("venus", (8, 8, 16)), ("mars", (16, 8, 16))),
]
THOROUGH: list[tuple[str, Bits]] = [
    (platform, bits)
    for platform in ("venusa", "arcs", "venus", "mars")
    for bits in (
        *(EIGHT, SIXTEEN, (4, 8, 8), (8, 16, 8), (4, 4, 4), (8, 4, 16), (2, 2, 2), (3, 5, 7)),
        *((16, 4, 4), (4, 4, None), (16, 16, None), (8, 8, 32), (16, 16, 32)),
    )
    if (platform, bits) not in QUICK
]
# platform, dialect, width, kind of scale
Target = tuple[str, str, int, str]
EXPORTS: list[Target] = [
    ("onnxruntime", "qdq", 8, "free"),
    ("venusa", "linger", 8, "power_of_two"),
]
MORE_EXPORTS: list[Target] = [
    ("onnxruntime", "qdq", 8, "power_of_two"),
    ("onnxruntime", "qdq", 16, "free"),
    ("onnxruntime", "qdq", 16, "power_of_two"),
    ("venusa", "linger", 16, "power_of_two"),
    ("arcs", "linger", 8, "power_of_two"),
    ("venus", "linger", 8, "power_of_two"),
]
# What a refusal has to say beside the site and the reason.
REMEDY = re.compile(r"\b(Use|Leave|Write|Pad|Export|Quantize|Give|Do|Set|Keep|overrides|strict)\b")

# A quick run takes one form of each kind, the first of its cases.
FIRST = [case for case in ALL if case is next(c for c in ALL if c.kind == case.kind)]

each_case = pytest.mark.parametrize(
    "case",
    [case if case in FIRST else pytest.param(case, marks=pytest.mark.slow) for case in ALL],
    ids=lambda case: case.id,
)


def prepared(
    case: Case, platform: str, bits: Bits, **fields: Any
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A fresh model of a case, quantized and trained for a few forwards, in evaluation mode.

    A wide or a float output is that of the op itself, whose operands then have the input's width.
    """
    rng = random.Random(f"{case.id} {platform} {bits}")
    torch.manual_seed(rng.getrandbits(32))
    model, inputs = case.build(rng)
    linger.prepare(model, inputs)
    weight, activation, output = bits
    wide = output is None or output > 16
    config = QuantConfig(
        platform=platform,
        weight_bits=weight,
        activation_bits=activation,
        output_bits=activation if wide else output,
        **fields,
    )
    own = {f"type:{case.kind}": {"output_bits": output}}
    has_site = op_of(case.kind).has_site
    linger.quantize(model, config, overrides=own if wide and has_site else None)
    train(model, inputs, 2, 0.0)
    model.eval()
    assert_meets_the_op(case, model)
    return model, inputs


def assert_meets_the_op(case: Case, model: nn.Module) -> None:
    instrumentation = instrumentation_of(model)
    op = op_of(case.kind)
    assert op is not None, f"no op is registered for {case.kind!r}"
    if op.has_site:
        sites = [site for site in instrumentation.sites if site.op is op]
        reasons = {str(site.why_float) for site in sites}
        if case.why_float is not None:
            assert any(case.why_float in reason for reason in reasons), reasons
        else:
            assert any(s.quantized for s in sites), f"{case.kind!r} is not quantized: {reasons}"
    for kind in (case.kind, *case.covers):
        assert any(node.op == kind for node in instrumentation.graph), f"no call of {kind!r}"


def larger(inputs: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
    """The same inputs far outside the range that training has seen."""
    return tree_map_only(Tensor, lambda x: x * factor if x.is_floating_point() else x, inputs)


def both_inputs(case: Case, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield inputs
    if case.largest != 1:
        yield larger(inputs, case.largest)


# --- fake-quant equals integers ---------------------------------------------------------------


def assert_exact_on(case: Case, platform: str, bits: Bits) -> None:
    model, inputs = prepared(case, platform, bits)
    try:
        for x in both_inputs(case, inputs):
            assert_integer_exact(model, *x, finite=case.finite)
    except AssertionError as error:
        pytest.fail(f"{platform} {bits}: {error}")


@each_case
def test_fake_equals_integer(case: Case) -> None:
    for platform, bits in QUICK:
        if platform in case.platforms:
            assert_exact_on(case, platform, bits)


@pytest.mark.slow
@each_case
def test_fake_equals_integer_everywhere(case: Case) -> None:
    for platform, bits in THOROUGH:
        if platform in case.platforms:
            assert_exact_on(case, platform, bits)


@contextmanager
def tapped(model: nn.Module, tap: Any) -> Iterator[None]:
    instrumentation = instrumentation_of(model)
    instrumentation.tap = tap
    try:
        yield
    finally:
        instrumentation.tap = None


def has_kernel_of_its_own(site: Site) -> bool:
    """Whether evaluation is integer arithmetic with free scales too."""
    return site.op.exact_with_free_scales or site.op.output_scale == "inputs"


@each_case
def test_fake_equals_integer_with_free_scales(case: Case) -> None:
    """Op by op, on the same operands: a layer before it may differ in ties."""
    compared = []

    def tap(event: Event) -> None:
        site = event.site
        if site.op.kind != case.kind or site.system() != "integer":
            return
        fake = tree_map_only(Tensor, as_real, event.call)
        site.switches.system = "fake"
        try:
            found = site.op.run_fake(site, fake)
        finally:
            site.switches.system = "integer"
        if found is NotImplemented:  # a float result of a plain function
            return
        for a, b in zip(tree_leaves(found), tree_leaves(event.result), strict=True):
            if isinstance(b, Tensor):
                assert a.shape == b.shape
                real = real_values(b)
                assert torch.equal(a.isnan(), real.isnan()), f"{site.key} differs"
                assert torch.equal(a.nan_to_num(), real.nan_to_num()), f"{site.key} differs"
                compared.append(b)

    for bits in (EIGHT, SIXTEEN, (8, 8, 16), (8, 4, 8), (8, 8, None)):
        model, inputs = prepared(case, "onnxruntime", bits)
        sites = [site for site in instrumentation_of(model).sites if site.op.kind == case.kind]
        if not all(map(has_kernel_of_its_own, sites)) or not sites or case.why_float is not None:
            return
        with tapped(model, tap), linger.integer(model), torch.no_grad():
            for x in both_inputs(case, inputs):
                model(*x)
        assert compared


def stays_float_in_fixed_point(case: Case) -> bool:
    """Whether the platform `tflite` leaves the op in float, with a reason."""
    return case.kind in TFLITE.stays_float or case.why_float is not None


def fits_what_is_stored(event: Event) -> None:
    """Every code, its zero point added, fits the width that an engine stores."""
    for x in tree_leaves(event.result):
        tag = tag_of(x) if isinstance(x, Tensor) else None
        if tag is not None and tag.affine and not x.dtype.is_floating_point and x.numel():
            low, high = code_limits(tag.width)
            stored = x.long() + tag.zero_point
            assert low <= int(stored.min()), event.site.key
            assert int(stored.max()) <= high, event.site.key
            assert low <= tag.zero_point <= high, event.site.key


@each_case
def test_fake_equals_integer_in_fixed_point(case: Case) -> None:
    if stays_float_in_fixed_point(case):
        pytest.skip("it stays a float function")
    for bits in (EIGHT, (8, 8, None), SIXTEEN, (8, 4, 8)):
        model, inputs = prepared(case, "tflite", bits)
        for x in both_inputs(case, inputs):
            assert_integer_exact(model, *x, finite=case.finite)
            with tapped(model, fits_what_is_stored), linger.integer(model), torch.no_grad():
                model(*x)


def as_real(x: Tensor) -> Tensor:
    """What the fake-quant forward has where integers flow: real values on the grid, tagged."""
    tag = tag_of(x)
    return x if tag is None else with_tag(real_values(x), tag)


# --- gradients --------------------------------------------------------------------------------


class Gradients:
    """Compares a site's straight-through gradient with that of the float function.

    Both functions get the same values on the grid. A cotangent is sent back through both, to the
    float function without what lies outside the output's range. There is no one right answer next
    to the edges of the range, where an operand is saturated itself, and where the float gradient
    jumps (a tie of a maximum).
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.compared = 0
        self.saturated = 0

    def __call__(self, event: Event) -> None:
        site = event.site
        if site.op.kind != self.case.kind or site.system() != "fake" or site.merged:
            return
        operands = self._operands(event)
        if operands:
            with torch.enable_grad():
                self._compare(event, operands)

    def _operands(self, event: Event) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for position, x in enumerate(event.site.op.operands(event.call)):
            if isinstance(x, Tensor):
                operand = event.site.operand(position, x)
                if operand is not None:
                    found[id(x)] = operand
        return found

    def _compare(self, event: Event, operands: dict[int, Tensor]) -> None:
        site = event.site
        leaves = {key: fresh(x) for key, x in operands.items()}
        call = tree_map_only(Tensor, lambda x: leaves.get(id(x), x), event.call)
        results = [y for y in tree_leaves(site.op.run_fake(site, call)) if differentiable(y)]
        assert results, f"{site.key}: the result has no gradient"
        inside, outside = self._float(event, leaves, results)
        wanted = [mask | beyond for mask, beyond in zip(inside, outside, strict=True)]
        cotangents = [torch.randn_like(y) for y in results]
        found = gradients(leaves, results, cotangents, wanted)
        assert all(torch.isfinite(g).all() for g in found), (
            f"{site.key}: the gradient is not finite"
        )
        if site.output is not None:
            self.saturated += sum(int(beyond.sum()) for beyond in outside)
            nothing = gradients(leaves, results, cotangents, outside)
            assert not any(g.any() for g in nothing), f"{site.key}: a gradient where it saturates"
        if self.case.gradient != "float":
            self.compared += 1
            return
        expected = self._expected(event, operands, cotangents, inside)
        nearby = [self._expected(event, at, cotangents, inside) for at in around(site, operands)]
        for x, mine, reference, *others in zip(
            operands.values(), found, expected, *nearby, strict=True
        ):
            smooth = torch.isfinite(reference) & not_at_an_end(x)
            for other in others:
                smooth &= torch.isclose(other, reference, rtol=1e-2, atol=1e-4)
            self.compared += int(smooth.sum())
            torch.testing.assert_close(mine[smooth], reference[smooth], rtol=1e-4, atol=1e-5)

    def _float(
        self, event: Event, leaves: dict[int, Tensor], results: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Where a result lies well inside the range of its quantizer, and where well outside."""
        site = event.site
        everywhere = [torch.ones_like(y, dtype=torch.bool) for y in results]
        nowhere = [~mask for mask in everywhere]
        tag = tag_of(results[0])
        # What is rounded inside an op moves its result away from that of the float function.
        moves = bool(site.parts) and self.case.gradient != "float"
        if site.output is None or tag is None or len(results) != 1 or moves:
            return everywhere, nowhere
        step = float(tag.step)
        low, high = (float(code) * step for code in site.output.code_bounds(step))
        (real,) = floats(event.run_float(lambda x: plain(leaves.get(id(x), x))))
        inside = (real > low + step) & (real < high - step)
        outside = (real < low - step) | (real > high + step)
        return [inside], [outside]

    def _expected(
        self,
        event: Event,
        operands: dict[int, Tensor],
        cotangents: list[Tensor],
        inside: list[Tensor],
    ) -> list[Tensor]:
        leaves = {key: fresh(x) for key, x in operands.items()}
        results = floats(event.run_float(lambda x: leaves.get(id(x), plain(x))))
        return gradients(leaves, results, cotangents, inside)


def fresh(x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    tag = tag_of(x)
    return leaf if tag is None else with_tag(leaf, tag)


def plain(x: Tensor) -> Tensor:
    return x.detach().clone()


def around(site: Site, operands: dict[int, Tensor]) -> list[dict[int, Tensor]]:
    """Return values a little off the grid, this way and that, to see where a gradient jumps.

    An op that brings its operands to one scale compares them only so far as this scale can tell,
    and one that clamps has its edges on the grid.
    """
    steps = [float(tag.step) for tag in map(tag_of, operands.values()) if tag is not None]
    keeps = site.op.output_scale == "inputs"
    compares = keeps and len(operands) > 1
    found = []
    for _ in range(4 if keeps else 1):
        shifts = {
            key: torch.randn_like(x)
            * (
                (4 if compares else 1) * max(steps)
                if keeps
                else 1e-3 * x.detach().abs().max().clamp(min=1e-3)
            )
            for key, x in operands.items()
        }
        found += [{key: x + sign * shifts[key] for key, x in operands.items()} for sign in (1, -1)]
    return found


def not_at_an_end(x: Tensor) -> Tensor:
    """Where a value is not saturated: through an end code its own quantizer lets no gradient."""
    tag = tag_of(x)
    assert tag is not None
    low, high = tag.limits
    codes = torch.round(x.detach() / float(tag.step))
    return (codes > low) & (codes < high)


def differentiable(y: Any) -> bool:
    return isinstance(y, Tensor) and y.requires_grad


def floats(results: Any) -> list[Tensor]:
    return [y for y in tree_leaves(results) if isinstance(y, Tensor) and y.is_floating_point()]


def gradients(
    leaves: dict[int, Tensor], results: list[Tensor], cotangents: list[Tensor], masks: list[Tensor]
) -> list[Tensor]:
    sent = [g.to(y.dtype) * m for g, y, m in zip(cotangents, results, masks, strict=True)]
    tensors = list(leaves.values())
    found = torch.autograd.grad(results, tensors, sent, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found, strict=True)]


@each_case
def test_gradient(case: Case) -> None:
    if case.gradient == "none" or case.why_float is not None or not op_of(case.kind).has_site:
        pytest.skip("has no gradient of its own")
    check = Gradients(case)
    targets = [("venusa", EIGHT), ("venusa", SIXTEEN), ("onnxruntime", EIGHT)]
    if not stays_float_in_fixed_point(case):
        targets.append(("tflite", EIGHT))
    for platform, bits in targets:
        model, inputs = prepared(case, platform, bits)
        with tapped(model, check):
            for x in both_inputs(case, inputs):
                model(*x)
    if not check.compared:
        pytest.skip("its clamping is done by the quantizer before it")


# --- export -----------------------------------------------------------------------------------


def session(path: Any, optimized: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def assert_equal_results(found: list[Any], expected: list[Tensor], where: str) -> None:
    assert len(found) == len(expected)
    for index, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        result = torch.from_numpy(result)
        assert result.dtype == wanted.dtype, where
        assert result.shape == wanted.shape, where
        wrong = int((result != wanted).sum())
        assert torch.equal(result, wanted), f"{where}: output {index}, {wrong} of {wanted.numel()}"


def run_onnxruntime(path: Any, optimized: bool, inputs: tuple[Any, ...]) -> list[Any]:
    running = session(path, optimized)
    names = [value.name for value in running.get_inputs()]
    arrays = [x.numpy() for x in flat_tensors(inputs)]
    return running.run(None, dict(zip(names, arrays, strict=True)))


def run_linger(path: Any, inputs: tuple[Any, ...]) -> list[Any]:
    onnx.checker.check_model(onnx.load(path), full_check=True)
    runner = OnnxIntegerRunner(path)
    arrays = [x.numpy() for x in flat_tensors(inputs)]
    return list(runner.run(dict(zip(runner.input_names, arrays, strict=True))).values())


def integer_results(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad(), linger.integer(model):
        return flat_tensors(model(*inputs))


@pytest.mark.parametrize("target", EXPORTS, ids=lambda target: f"{target[0]}-{target[2]}")
@each_case
def test_export(case: Case, target: Target, tmp_path: Any) -> None:
    assert_exports_or_refuses(case, target, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("target", MORE_EXPORTS, ids=lambda t: f"{t[0]}-{t[2]}-{t[3]}")
@each_case
def test_export_everywhere(case: Case, target: Target, tmp_path: Any) -> None:
    assert_exports_or_refuses(case, target, tmp_path / "model.onnx")


def assert_exports_or_refuses(case: Case, target: Target, path: Any) -> None:
    platform, dialect, bits, scale = target
    if case.why_float is not None:
        pytest.skip("it stays a float function")
    if dialect == "linger" and platform not in case.platforms:
        pytest.skip("the case is not for this platform")
    # Narrow weights keep the layer in front within what onnxruntime adds exactly.
    widths = (4 if dialect == "qdq" and bits == 16 else 8, bits, bits)
    model, inputs = prepared(case, platform, widths, scale=scale)
    refusal = case.refusal(dialect, platform, bits)
    if refusal is not None:
        with pytest.raises(UnsupportedError, match=re.escape(refusal)) as caught:
            export_onnx(model, inputs, path, dialect)
        assert "`" in str(caught.value), "the message does not name the site"
        assert REMEDY.search(str(caught.value)), "the message does not say what to do"
        return
    export_onnx(model, inputs, path, dialect)
    # One Quant per value and scale, none behind a Dequant, and neighbours agree about scales.
    assert inspect_model(path).problems == []
    for x in both_inputs(case, inputs):
        expected = integer_results(model, x)
        if dialect == "linger":
            assert_equal_results(run_linger(path, x), expected, platform)
            continue
        for optimized in (True, False) if scale == "power_of_two" else (True,):
            if optimized or case.optimizable:
                found = run_onnxruntime(path, optimized, x)
                assert_equal_results(found, expected, f"{optimized=}")


# --- the list of cases ------------------------------------------------------------------------


def test_every_kind_has_a_case() -> None:
    exercised = {kind for case in ALL for kind in (case.kind, *case.covers)}
    missing = sorted({op.kind for op in all_ops()} - exercised)
    assert not missing, f"no case in tests/ops/cases exercises {missing}"


def test_no_two_cases_have_one_name() -> None:
    names = [case.id for case in ALL]
    assert sorted(set(names)) == sorted(names)


def test_a_refusal_is_not_taken_for_an_export() -> None:
    case = dataclasses.replace(ALL[0], refused={"linger": "a", "venus": "b", "linger/16": None})
    found = [case.refusal("linger", platform, bits) for platform, bits in _asked()]
    assert found == ["a", "b", None, None]
    assert case.refusal("qdq", "onnxruntime", 8) is None


def _asked() -> list[tuple[str, int]]:
    return [("venusa", 8), ("venus", 8), ("venusa", 16), ("arcs", 16)]


def test_the_page_of_operators_is_current() -> None:
    assert operators_table.PAGE.read_text() == operators_table.page()
