"""Ops that other exporters write and this one does not: the runner computes them as the model does.

The library's own dialects are given rows for them here, so that every number in the files is the
one that the model computes with.
"""

import dataclasses
import functools

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxscript import ir
from torch import nn

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, dialects, export_onnx
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.generations import ONLY_READ, TYPED_NAMES
from lightning_linger.export.inspection import inspect_model
from lightning_linger.export.linger.attributes import (
    common_attributes,
    reciprocal,
)
from lightning_linger.export.linger.older import respell
from lightning_linger.export.linger.schema import DOMAIN
from lightning_linger.export.linger.tidy import tidy
from lightning_linger.export.repair import repair
from tests.export.graphs import model_of, node
from tests.models import Lambda

OLDER = "thinker"
# Of codes that the recorded op does not name a step of: that of the layer which makes them.
STEP = 2.0**-6


def older_attributes(call, **given):
    """What every op of the older generation says."""
    platform = common_attributes(call)["platform"]
    steps = {
        f"scale_{name}": reciprocal(call, call.arguments.get(f"scale_{name}", STEP))
        for name in "xo"
    }
    return {"platform": platform, **steps, **given}


def write_sum(builder, call):
    attributes = older_attributes(call, dims=list(call.dim), keepdims=int(call.keepdim))
    return builder.node("iqSum", [call.x], attributes, domain=DOMAIN)


def write_var(builder, call):
    (dim,) = call.dim
    given = {"dim": dim, "unbiased": call.correction, "keepdim": int(call.keepdim)}
    return builder.node("iqVar", [call.x], older_attributes(call, **given), domain=DOMAIN)


def write_max(builder, call):
    attributes = older_attributes(call, scale_y=1 / STEP)
    return builder.node("iqMax", [call.x, call.y], attributes, domain=DOMAIN)


def write_clamp(builder, call):
    attributes = older_attributes(call, min=call.low * STEP, max=call.high * STEP)
    return builder.node("iqClamp", [call.x], attributes, domain=DOMAIN)


def write_gru(name, builder, call):
    older = name != "QGRU"
    x, inputs = call.x, shape_of(call.x)[2]
    steps, hidden = shape_of(x)[1], shape_of(call.weight_hh)[1]
    scale_o = reciprocal(call, call.scale_o)
    attributes = common_attributes(call) | {
        **{"input_size": inputs, "hidden_size": hidden, "num_layers": 1, "batch_first": 0},
        **{"go_forward": int(not call.reverse), "scale_h": scale_o, "scale_o": scale_o},
        "scale_i" if older else "scale_x": reciprocal(call, call.scale_x),
        "data_bits" if older else "x_bits": 8,
        "parameter_bits" if older else "w_bits": 8,
        "scale_iw": reciprocal(call, call.scale_ih[0]),
        "scale_hw": reciprocal(call, call.scale_hh[0]),
        "o_bits": 8,
    }
    lengths = [builder.constant(np.array([steps]), "lengths")] if "Is64" in name else []
    parameters = [
        builder.parameter(getattr(call, parameter), parameter)
        for parameter in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    outputs = [(ir.DataType.INT8, [1, steps, hidden]), (ir.DataType.INT8, [1, 1, hidden])]
    y, last = builder.nodes(name, [x, *lengths, *parameters], outputs, attributes, domain=DOMAIN)
    target = builder.constant(np.array([1, hidden], np.int64), "shape")
    state = builder.node(
        "Reshape", [last, target], suffix="state", shape=[1, hidden], dtype=ir.DataType.INT8
    )
    return [y, state]


ROWS = {"sum": write_sum, "var": write_var, "maximum": write_max, "clamp": write_clamp}


@pytest.fixture
def extended(monkeypatch):
    """A generation with rows for the ops, by the name of its GRU."""

    def extend(generation, gru):
        def finish(graph):
            tidy(graph)
            for found in graph:
                if found.op_type in (*ONLY_READ, *TYPED_NAMES):
                    found.domain = OLDER
            if generation == "linger1":
                respell(graph)

        own = dialects.DIALECTS[generation]
        rows = {**own.table, **ROWS, "gru": functools.partial(write_gru, gru)}
        dialect = dataclasses.replace(
            own, name="extended", table=rows, domains={**own.domains, OLDER: 1}, finish=finish
        )
        monkeypatch.setitem(dialects.DIALECTS, "extended", dialect)
        return "extended"

    return extend


X = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32))


def quantized(run, layers, platform):
    torch.manual_seed(0)
    model = linger.prepare(Lambda(run, fc=nn.Linear(8, 8), **layers()), (X,))
    linger.quantize(model, linger.QuantConfig(platform=platform))
    return linger.calibrate(model, [(X,)]).eval()


CASES = {
    "iqSum": (lambda m, x: m.fc(x).sum(-1), dict),
    "iqSum, two dims kept": (lambda m, x: m.fc(x).sum((1, 2), keepdim=True), dict),
    "iqVar": (lambda m, x: m.fc(x).var(-1), dict),
    "iqVar, biased": (lambda m, x: m.fc(x).var(1, unbiased=False, keepdim=True), dict),
    "iqMax": (lambda m, x: torch.maximum(m.fc(x), m.fc(x).neg()), dict),
    "iqClamp": (lambda m, x: torch.roll(m.fc(x), 1, -1).clamp(-0.25, 0.4), dict),
    "GRU": (lambda m, x: m.rnn(m.fc(x)), lambda: {"rnn": nn.GRU(8, 5, batch_first=True)}),
    "GRU, both ways": (
        lambda m, x: m.rnn(m.fc(x))[0],
        lambda: {"rnn": nn.GRU(8, 5, batch_first=True, bidirectional=True)},
    ),
}
GRUS = {"linger": ["QGRU"], "linger1": ["GRUInt", "GRUInt_Is8_Is64"]}


def written_cases():
    for generation, names in GRUS.items():
        for case in CASES:
            op, _, _ = case.partition(",")
            for name in names if op == "GRU" else [op]:
                yield pytest.param(generation, case, name, id=f"{generation}-{case}-{name}")


@pytest.mark.parametrize("platform", ["venusa", "venus"])
@pytest.mark.parametrize(("generation", "case", "name"), list(written_cases()))
def test_the_runner_computes_what_the_model_does(
    generation, case, name, platform, extended, tmp_path
):
    run, layers = CASES[case]
    model = quantized(run, layers, platform)
    with torch.no_grad(), linger.integer(model):
        wanted = model(X)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    path = export_onnx(model, (X,), tmp_path / "m.onnx", extended(generation, name))
    assert name in {found.op_type for found in onnx.load(path).graph.node}
    found = OnnxIntegerRunner(path).run({"input_0": X.numpy()}).values()
    for ours, theirs in zip(wanted, found, strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs))
        assert theirs.std() > 0 or theirs.size == 1
    # The other tools know the ops too.
    inspection = inspect_model(path)
    assert inspection.problems == []
    assert inspection.dialect == ("linger3" if name == "QGRU" else "linger1")
    assert next(row for row in inspection.chain if row.op == name).does == "integer"
    assert repair(path).changes == []


def test_pads_are_those_of_onnx(tmp_path):
    """``iqPad`` is the standard op under another name."""
    model = quantized(lambda m, x: F.pad(m.fc(x), (1, 2), value=0.4), dict, "venusa")
    with torch.no_grad(), linger.integer(model):
        wanted = model(X)
    proto = onnx.load(export_onnx(model, (X,), tmp_path / "m.onnx", "linger1"))
    pads = [found for found in proto.graph.node if found.op_type == "Pad"]
    for found in pads:
        found.op_type, found.domain = "iqPad", OLDER
    assert pads
    found = OnnxIntegerRunner(proto).run({"input_0": X.numpy()})["output"]
    assert torch.equal(wanted, torch.from_numpy(found))
    assert inspect_model(proto).problems == []
    assert repair(proto).changes == []


CODES = np.array([[-128, -7, 0, 3, 127]], np.int8)
FINE, COARSE = {"scale_x": 32.0, "scale_o": 32.0}, {"scale_x": 32.0, "scale_o": 16.0}
GRU = {
    **{"scale_x": 32.0, "scale_iw": 64.0, "scale_hw": 64.0, "scale_o": 128.0},
    **{"batch_first": 0, "input_size": 2, "hidden_size": 1},
}
WEIGHTS = {
    "wi": np.array([[9, -8], [50, 3], [-70, 60]], np.int8),
    "wh": np.array([[100], [-90], [80]], np.int8),
    "bi": np.array([1, 2, 3], np.int32),
    "bh": np.array([-4, 5, 600], np.int32),
    "short": np.array([2], np.int64),
    "state": np.array([[[0.5]]], np.float32),
}
OF_GRU = ["wi", "wh", "bi", "bh"]


def run(op_type, inputs=("x",), x=CODES, constants=(), **attributes):
    outputs = ["y", "h"] if "GRU" in op_type else ["y"]
    made = node(op_type, list(inputs), outputs, **attributes)
    model = model_of([made], "x", "y", constants, x=onnx.TensorProto.INT8)
    return OnnxIntegerRunner(model).run({"x": x})["y"]


def test_pads_may_repeat_what_is_there():
    constants = {"pads": np.array([0, 1, 0, 2]), "c": np.int8(9), "real": np.float32(9)}
    found = run("iqPad", ("x", "pads"), constants=constants, mode="reflect")
    assert np.array_equal(found, np.pad(CODES, ((0, 0), (1, 2)), mode="reflect"))
    found = run("iqPad", ("x", "pads", "c"), constants=constants)
    assert np.array_equal(found, np.pad(CODES, ((0, 0), (1, 2)), constant_values=9))
    with pytest.raises(linger.UnsupportedError, match="codes are padded with a code"):
        run("iqPad", ("x", "pads", "real"), constants=constants)


def test_extremes_meet_at_the_scale_of_the_result():
    """Operands of two scales, the result as coarse as the coarser one."""
    y = np.array([[10, -30, 1, 2, -128]], np.int8)
    found = run("iqMax", ("x", "c"), constants={"c": y}, **COARSE, scale_y=16.0)
    halved = np.floor(CODES / 2 + 0.5)
    assert np.array_equal(found, np.maximum(halved, y))


def test_clamps_move_to_the_scale_of_the_result():
    found = run("iqClamp", **COARSE, min=-1.0, max=2.0)
    assert np.array_equal(found, np.clip(np.floor(CODES / 2 + 0.5), -16, 32))
    assert np.array_equal(run("iqClamp", **FINE), CODES)


def test_reductions_without_dims_take_everything():
    assert run("iqSum", **FINE | {"scale_o": 8.0}).tolist() == -1
    whole = CODES.astype(np.int64)
    variance = (5 * (whole**2).sum() - whole.sum() ** 2) / 20
    assert run("iqVar", **FINE | {"scale_o": 8.0}) == np.floor(variance / 32**2 * 8 + 0.5)


def test_a_gru_may_start_from_a_state():
    x = np.array([[[50, -20], [3, 127]]], np.int8)
    given = {"constants": WEIGHTS, "x": x, **GRU}
    cold = run("QGRU", ("x", *OF_GRU), **given)
    warm = run("GRUInt", ("x", "state", *OF_GRU), **given)
    assert cold.shape == (1, 2, 1)
    assert not np.array_equal(cold, warm)
    codes = {**WEIGHTS, "state": np.array([[[64]]], np.int8)}
    assert np.array_equal(
        run("QGRU", ("x", "state", *OF_GRU), **given | {"constants": codes}), warm
    )


@pytest.mark.parametrize(
    ("op_type", "given", "match"),
    [
        ("iqSum", {**FINE, "dims": [0, -2]}, r"dims must be different dimensions of 2"),
        ("iqSum", {**FINE, "dims": [2]}, r"dims must be different .* Found: \[2\]"),
        ("iqSum", {**FINE, "dims": 1}, r"'dims' must be INTS"),
        ("iqVar", {**FINE, "dim": 0}, r"no more values than the correction of 1"),
        ("iqVar", {**FINE, "unbiased": "yes"}, r"'unbiased' must be INT"),
        ("iqClamp", {**FINE, "min": "low"}, r"'min' must be FLOAT"),
        ("iqMax", FINE, r"lacks its input 1"),
        ("QGRU", {**GRU, "inputs": ["x", *OF_GRU]}, r"one sequence \[1, T, I\]"),
    ],
)
def test_what_they_cannot_mean_is_refused(op_type, given, match):
    with pytest.raises(linger.UnsupportedError, match=match):
        run(op_type, given.pop("inputs", ["x"]), constants=WEIGHTS, **given)


def test_a_part_of_a_sequence_is_refused():
    x = np.zeros((1, 3, 2), np.int8)
    with pytest.raises(linger.UnsupportedError, match=r"of 3 steps\. Found the lengths \[2\]"):
        run("GRUInt_Is8_Is64", ["x", "short", *OF_GRU], x=x, constants=WEIGHTS, **GRU)
    with pytest.raises(linger.UnsupportedError, match=r"1 state\(s\) or none"):
        run("QGRU", ["x", "state", "state", *OF_GRU], x=x, constants=WEIGHTS, **GRU)


def test_clips_of_earlier_opsets_have_real_edges():
    with pytest.raises(linger.UnsupportedError, match="the edges of codes have to be codes"):
        run("Clip", min=0.0, max=6.0)
    found = run("Clip", x=np.float32([-1.0, 3.0, 9.0]), min=0.0, max=6.0)
    assert found.tolist() == [0.0, 3.0, 6.0]
