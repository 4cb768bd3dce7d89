"""What moves values: tags pass, codes stay codes, and the engine's own moves do the same."""

import itertools
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxscript import ir
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig, UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.tags import tag_of
from lightning_linger.export import OnnxIntegerRunner
from lightning_linger.export.linger.moves import (
    merged_axes,
    period_of,
    repeats_of,
    runs_of,
    swaps,
)
from lightning_linger.export.linger.schema import DOMAIN
from lightning_linger.export.linger.tidy import tidy
from lightning_linger.ops.movement import diagonal_of, unfolded, unfolded_image
from lightning_linger.ops.pad import padded_codes
from tests.models import Lambda, assert_integer_exact, site_of, trained
from tests.ops.cases import movement

IMAGE = (2, 4, 6, 6)


def on_conv(function: Any) -> nn.Module:
    return Lambda(lambda self, x: function(self.conv(x)), conv=nn.Conv2d(4, 4, 3, padding=1))


# --- tags -------------------------------------------------------------------------------------

MOVES: dict[str, Any] = {
    "flatten": lambda a: a.flatten(1),
    "permute": lambda a: a.permute(3, 0, 2, 1),
    "T": lambda a: a.mT,
    "slice": lambda a: a[:, 1:3, ::2],
    "listed": lambda a: a[:, [0, 2, 2]],
    "index_select": lambda a: a.index_select(1, torch.tensor([2, 0])),
    "expand": lambda a: a[:, :1].expand(-1, 3, -1, -1),
    "repeat": lambda a: a.repeat(1, 2, 1, 1),
    "tile": lambda a: a.tile(2, 1, 1),
    "repeat_interleave": lambda a: a.repeat_interleave(2, dim=2),
    "roll": lambda a: torch.roll(a, 2, 3),
    "flip": lambda a: torch.flip(a, [1, 3]),
    "rot90": lambda a: torch.rot90(a, 3, (2, 3)),
    "gather": lambda a: a.gather(3, torch.ones((2, 4, 6, 2), dtype=torch.int64)),
    "take_along_dim": lambda a: torch.take_along_dim(a, torch.tensor([[[[2]]]]), 3),
    "take": lambda a: a.take(torch.tensor([5, 1])),
    "masked_select": lambda a: a.masked_select(torch.arange(6) > 3),
    "diagonal": lambda a: a.diagonal(1, 2, 3),
    "tril": lambda a: a.tril(-1),
    "triu": lambda a: torch.triu(a, 2),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a, 2),
    "pixel_unshuffle": lambda a: F.pixel_unshuffle(a, 3),
    "channel_shuffle": lambda a: F.channel_shuffle(a, 2),
    "unfold": lambda a: a.unfold(3, 4, 2),
    "windows": lambda a: F.unfold(a, (2, 3), padding=1),
    "narrow": lambda a: torch.narrow(a, 3, 1, 2),
    "hsplit": lambda a: a.hsplit(2)[0],
    "pad": lambda a: F.pad(a, (1, 0, 2, 1)),
    "reflect": lambda a: F.pad(a, (1, 2, 2, 1), mode="reflect"),
    "replicate": lambda a: F.pad(a, (3, 0, 0, 1), mode="replicate"),
    "circular": lambda a: F.pad(a, (2, 1, 0, 1), mode="circular"),
    "detach": lambda a: a.detach().clone().contiguous(),
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", MOVES)
def test_a_movement_keeps_the_grid(name: str, bits: int) -> None:
    """The same values at other places, with the step and the width that they had."""
    function = MOVES[name]
    x = torch.randn(IMAGE)
    model = Lambda(lambda self, x: (self.conv(x), function(self.conv(x))), conv=nn.Conv2d(4, 4, 1))
    trained(model, x, config=QuantConfig(activation_bits=bits, output_bits=bits))
    before, after = model(x)
    assert torch.equal(after, function(before.detach().clone()))
    assert (tag_of(after).step, tag_of(after).bits) == (tag_of(before).step, bits)
    payloads: list[torch.dtype] = []
    again = on_conv(lambda a: function(a) * 2)
    trained(again, x, config=QuantConfig(activation_bits=bits, output_bits=bits))
    instrumentation_of(again).tap = lambda event: payloads.append(event.call.input.dtype)
    with torch.no_grad(), linger.integer(again):
        again(x)
    instrumentation_of(again).tap = None
    assert payloads[-1] == (torch.int8 if bits == 8 else torch.int16)
    assert_integer_exact(model, x)
    assert_integer_exact(again, x * 40)


def test_every_movement_has_tags_that_pass() -> None:
    named = {case.kind for case in movement.CASES}
    assert {"unfold", "cast", "gather", "roll"} <= named


def test_broadcasting_a_mask_is_no_movement_of_activations() -> None:
    x = torch.randn(IMAGE)
    model = on_conv(lambda a: a.relu() * torch.tensor([True, False]).repeat(3))
    assert_integer_exact(trained(model, x), x)


# --- casts ------------------------------------------------------------------------------------

CASTS: dict[str, Any] = {
    "double": lambda a: a.double(),
    "to": lambda a: a.to(torch.float64),
    "to-keyword": lambda a: a.to(dtype=torch.float64, copy=True),
    "type": lambda a: a.type(torch.float64),
    "type-name": lambda a: a.type("torch.DoubleTensor"),
    "to-like": lambda a: a.to(torch.zeros(1, dtype=torch.float64)),
    "type_as": lambda a: a.type_as(torch.zeros(1, dtype=torch.float64)),
    "half": lambda a: a.half(),
    "bfloat16": lambda a: a.bfloat16(),
    "there-and-back": lambda a: a.bfloat16().float(),
    "float": lambda a: a.float(),
    "cpu": lambda a: a.cpu(),
    "device": lambda a: a.to(a.device),
    "self": lambda a: a.to(a),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_keeps_the_grid(name: str) -> None:
    function = CASTS[name]
    x = torch.randn(IMAGE)
    wanted = function(torch.randn(2)).dtype
    model = Lambda(
        lambda self, x: (function(self.conv(x)), function(self.conv(x)).float() * 2),
        conv=nn.Conv2d(4, 4, 1),
    )
    trained(model, x)
    cast, product = model(x)
    assert cast.dtype == wanted
    assert tag_of(cast).dtype == wanted
    assert tag_of(cast).step == site_of(model, "conv/conv2d/0").output.step()
    assert site_of(model, "/mul/0").quantized
    assert product.dtype == torch.float32
    assert_integer_exact(model, x)
    with torch.no_grad(), linger.integer(model):
        whole, _ = model(x)
    assert whole.dtype == wanted
    assert torch.equal(whole.double(), cast.double())


@pytest.mark.parametrize("kind", ["long", "int", "to", "bool"])
def test_a_cast_to_whole_numbers_leaves_the_grid(kind: str) -> None:
    def function(a: Tensor) -> Tensor:
        y = a * 30
        return y.to(torch.int32) if kind == "to" else getattr(y, kind)()

    x = torch.randn(IMAGE)
    model = trained(on_conv(function), x)
    assert tag_of(model(x)) is None
    assert_integer_exact(model, x)


def test_a_mask_cast_like_an_activation_is_real() -> None:
    """In the integer model an activation is int8; what is cast like it has to be float."""
    x = torch.randn(IMAGE)
    mask = torch.arange(6) > 2
    for cast in (lambda a: mask.type_as(a), lambda a: mask.to(a), lambda a: mask.to(a.dtype)):
        model = trained(on_conv(lambda a, c=cast: (a * 1, c(a))), x)
        assert_integer_exact(model, x)
        with torch.no_grad(), linger.integer(model):
            assert model(x)[1].dtype == torch.float32


def test_asking_for_the_type() -> None:
    x = torch.randn(IMAGE)
    seen = []
    model = trained(on_conv(lambda a: (seen.append(a.type()), a * 1)[1]), x)
    with torch.no_grad(), linger.integer(model):
        model(x)
    assert set(seen) == {"torch.FloatTensor"}


def test_a_dtype_that_does_not_hold_the_codes() -> None:
    x = torch.randn(IMAGE)
    config = QuantConfig(output_bits=16)
    with pytest.raises(UnsupportedError, match=r"`conv/conv2d/0`.*16-bit.*at most 9 bits"):
        trained(on_conv(lambda a: a.bfloat16()), x, config=config)
    with pytest.raises(UnsupportedError, match="at most 12 bits"):
        trained(on_conv(lambda a: a.half()), x, config=config)


def test_a_cast_does_not_change_what_others_read() -> None:
    x = torch.randn(IMAGE)

    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        wide = a.double()
        return wide, a * 1

    model = trained(on_conv(function), x)
    with torch.no_grad(), linger.integer(model):
        wide, product = model(x)
    assert (wide.dtype, product.dtype) == (torch.float64, torch.float32)


def test_gradients_flow_through_casts() -> None:
    x = torch.randn(IMAGE)
    model = trained(on_conv(lambda a: a.double().float()), x)
    model(x).sum().backward()
    assert model.conv.weight.grad.abs().sum() > 0


# --- codes, one by one ------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_image_windows(data: st.DataObject) -> None:
    """``F.unfold``: every value looked up where it stands."""
    draw = data.draw
    kernel, dilation, stride = (
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(3)
    )
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    sizes = [
        max(d * (k - 1) + 1 - 2 * p, 1) + draw(st.integers(0, 4))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    x = torch.randint(-128, 128, (2, 3, *sizes), dtype=torch.int8)
    found = unfolded_image(x, kernel, dilation, padding, stride)
    counts = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(sizes, padding, dilation, kernel, stride, strict=True)
    ]
    columns = []
    for row, column in itertools.product(*map(range, counts)):
        values = []
        for c, i, j in itertools.product(range(3), range(kernel[0]), range(kernel[1])):
            y = row * stride[0] + i * dilation[0] - padding[0]
            z = column * stride[1] + j * dilation[1] - padding[1]
            inside = 0 <= y < sizes[0] and 0 <= z < sizes[1]
            values.append(x[:, c, y, z] if inside else torch.zeros(2, dtype=torch.int8))
        columns.append(torch.stack(values, 1))
    assert torch.equal(found, torch.stack(columns, 2))
    assert torch.equal(unfolded_image(x[0], kernel, dilation, padding, stride), found[0])


@settings(max_examples=60)
@given(data=st.data())
def test_windows_and_diagonals(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    x = torch.arange(math.prod(shape)).view(shape)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = data.draw(st.integers(1, shape[dim]))
    step = data.draw(st.integers(1, 3))
    assert torch.equal(unfolded(x, dim, size, step), x.unfold(dim, size, step))
    first, second = data.draw(st.permutations(range(len(shape))))[:2]
    offset = data.draw(st.integers(-3, 3))
    wanted = x.numpy().diagonal(offset, first, second)
    assert np.array_equal(diagonal_of(x, offset, first, second).numpy(), wanted)


@settings(max_examples=60)
@given(data=st.data())
def test_padding_with_what_is_there(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(2, 6), min_size=3, max_size=4))
    mode = data.draw(st.sampled_from(["reflect", "replicate", "circular"]))
    x = torch.randint(-128, 128, shape, dtype=torch.int8)
    last = [data.draw(st.integers(0, shape[-1] - 1)) for _ in range(2)]
    before = [data.draw(st.integers(0, shape[-2] - 1)) for _ in range(2)]
    numpy_mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    widths = [(0, 0)] * (len(shape) - 2) + [tuple(before), tuple(last)]
    found = padded_codes(x, [*last, *before], mode)
    assert np.array_equal(found.numpy(), np.pad(x.numpy(), widths, mode=numpy_mode))


@pytest.mark.parametrize("value", [0.3, -0.3, 5.0, -5.0, math.inf, -math.inf])
def test_a_number_to_pad_with_is_the_nearest_code(value: float) -> None:
    x = torch.randn(IMAGE)
    model = trained(on_conv(lambda a: F.pad(a, (1, 0), value=value)), x)
    y = model(x)
    step = tag_of(y).step
    nearest = max(-128, min(127, value / step))
    assert set((y[..., 0] / step).flatten().tolist()) == {math.floor(nearest + 0.5)}
    assert_integer_exact(model, x)


# --- the engine's moves -----------------------------------------------------------------------


@pytest.mark.parametrize("cheap", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_exchanges_of_blocks_give_every_permutation(rank: int, cheap: bool) -> None:
    for perm in itertools.permutations(range(rank)):
        order = list(range(rank))
        for i, j, k in swaps(perm, cheap):
            order = [*order[:i], *order[j:k], *order[i:j], *order[k:]]
        assert tuple(order) == perm


@given(data=st.data())
def test_axes_that_stay_side_by_side_are_one(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    perm = tuple(data.draw(st.permutations(range(len(shape)))))
    sizes, order = merged_axes(shape, perm)
    assert 1 not in sizes
    x = np.arange(math.prod(shape))
    wanted = x.reshape(shape).transpose(perm).reshape(-1)
    assert np.array_equal(x.reshape(sizes).transpose(order).reshape(-1), wanted)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_places(places: list[int]) -> None:
    assert [p for run in runs_of(places) for p in range(*run)] == places
    times = repeats_of(places)
    assert [p for p in places[::times] for _ in range(times)] == places
    period = period_of(places)
    assert places[:period] * (len(places) // period) == places


def graph_of(nodes: list[Any], shape: list[int], constants: dict[str, Any]) -> onnx.ModelProto:
    """A quantized input, then movements of its codes."""
    entry = helper.make_node(
        "Quant",
        ["x"],
        ["codes"],
        name="entry",
        domain=DOMAIN,
        platform="venusA",
        quant_mode="floor_add",
        data_bits=8,
        scale_x=16.0,
    )
    given = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(
        [entry, *nodes],
        "moves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT8, None)],
        given,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def assert_moves_alike(nodes: list[Any], shape: list[int], constants: dict[str, Any]) -> list[str]:
    """Rewrite for the engine, run, and compare with ONNX's own implementation of the movement."""
    codes = np.random.default_rng(3).integers(-128, 128, shape).astype(np.int8)
    plain = helper.make_model(
        helper.make_graph(
            nodes,
            "plain",
            [helper.make_tensor_value_info("codes", TensorProto.INT8, shape)],
            [helper.make_tensor_value_info("y", TensorProto.INT8, None)],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    (wanted,) = ReferenceEvaluator(plain).run(None, {"codes": codes})
    proto = onnx.shape_inference.infer_shapes(graph_of(nodes, shape, constants), data_prop=True)
    model = ir.serde.deserialize_model(proto)
    tidy(model.graph)
    written = ir.serde.serialize_model(model)
    found = OnnxIntegerRunner(written).run({"x": codes.astype(np.float32) / 16})
    (found,) = found.values()
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)
    for node in written.graph.node:
        assert_legal(node, written)
    return [node.op_type for node in written.graph.node][1:]


def assert_legal(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """What was measured on the engine, and nothing else."""
    legal = ("Quant", "QCat", "Reshape", "Flatten", "Slice", "Transpose", "Identity")
    assert node.op_type in legal, node.op_type
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    if node.op_type == "Slice":
        assert len(node.input) == 4
        assert all(constants[name].size == 1 for name in node.input[1:])
    if node.op_type == "QCat":
        assert len(node.input) <= 64
    if node.op_type == "Transpose":
        perm = "".join(str(d) for d in node.attribute[0].ints)
        right = "10 021 102 120 201 0231 0312 0132 1023"
        assert perm in right.split()


def numbers(*values: int) -> Any:
    return np.array(values, np.int64)


@settings(max_examples=80)
@given(data=st.data())
def test_every_transpose_is_a_chain_of_those_that_the_engine_has(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=6))
    perm = data.draw(st.permutations(range(len(shape))))
    node = helper.make_node("Transpose", ["codes"], ["y"], name="turn", perm=perm)
    assert_moves_alike([node], shape, {})


@settings(max_examples=80)
@given(data=st.data())
def test_every_choice_of_places(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = shape[axis]
    kind = data.draw(st.sampled_from(["any", "repeated", "even", "periodic"]))
    places = data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=9))
    if kind == "repeated":
        places = [place for place in places for _ in range(3)]
    if kind == "periodic":
        places = places * 4
    if kind == "even":
        places = list(range(data.draw(st.integers(0, size - 1)), size, 2))
    node = helper.make_node("Gather", ["codes", "places"], ["y"], name="choice", axis=axis)
    assert_moves_alike([node], shape, {"places": numbers(*places)})


@settings(max_examples=80)
@given(data=st.data())
def test_every_slice(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    axes = data.draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, unique=True))
    bounds: list[tuple[int, int, int]] = []
    for axis in axes:
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        chosen = data.draw(st.slices(shape[axis]).filter(lambda s: s.step is None or s.step))
        start, stop, _ = slice(chosen.start, chosen.stop, step).indices(shape[axis])
        if not range(start, stop, step):
            start, stop = (0, shape[axis]) if step > 0 else (-1, -(2**40))
        bounds.append((start, stop if stop >= 0 or step > 0 else -(2**40), step))
    names = ["starts", "ends", "axes", "steps"]
    starts, ends, steps = (numbers(*column) for column in zip(*bounds, strict=True))
    node = helper.make_node("Slice", ["codes", *names], ["y"], name="cut")
    constants = dict(zip(names, (starts, ends, numbers(*axes), steps), strict=True))
    assert_moves_alike([node], shape, constants)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    node = helper.make_node("DepthToSpace", ["codes"], ["y"], name="up", blocksize=2, mode=mode)
    assert_moves_alike([node], [2, 12, 3, 4], {})
    node = helper.make_node("SpaceToDepth", ["codes"], ["y"], name="down", blocksize=2)
    assert_moves_alike([node], [2, 3, 4, 6], {})


@pytest.mark.parametrize(
    ("shape", "target"),
    [([1, 4], [3, 4]), ([2, 1, 3], [2, 5, 3]), ([1], [2, 1, 130]), ([3, 1], [2, 3, 4])],
    ids=str,
)
def test_expand(shape: list[int], target: list[int]) -> None:
    node = helper.make_node("Expand", ["codes", "target"], ["y"], name="wide")
    assert_moves_alike([node], shape, {"target": numbers(*target)})


def test_tile_and_joins() -> None:
    node = helper.make_node("Tile", ["codes", "times"], ["y"], name="again")
    assert_moves_alike([node], [2, 3], {"times": numbers(2, 70)})
    node = helper.make_node("Concat", ["codes", "codes", "codes"], ["y"], name="join", axis=-1)
    assert assert_moves_alike([node], [2, 3], {}) == ["QCat"]


def test_gathers_of_elements() -> None:
    for index in (np.zeros((2, 3), np.int64), numbers(1, 0, 1, 1, 0, 0).reshape(2, 3)):
        node = helper.make_node("GatherElements", ["codes", "index"], ["y"], name="pick", axis=0)
        assert_moves_alike([node], [2, 3], {"index": index})
    node = helper.make_node("GatherND", ["codes", "index"], ["y"], name="pick")
    assert_moves_alike([node], [4, 3], {"index": numbers(3, 0, 1).reshape(3, 1)})


def test_what_the_engine_cannot_move_says_why() -> None:
    flip = helper.make_node(
        "Slice", ["codes", "starts", "ends", "axes", "steps"], ["y"], name="flip"
    )
    bounds = {
        "starts": numbers(-1),
        "ends": numbers(-(2**40)),
        "axes": numbers(1),
        "steps": numbers(-1),
    }
    assert_moves_alike([flip], [2, 64], bounds)
    with pytest.raises(UnsupportedError, match=r"behind `entry`.*in 65 pieces.*Keep to 64"):
        assert_moves_alike([flip], [2, 65], bounds)


WRITTEN: dict[str, tuple[Any, list[str]]] = {
    "reflect": (
        lambda a: F.pad(a, (1, 1, 0, 2), mode="reflect"),
        [*["Slice"] * 2, "QCat", *["Slice"] * 2, "QCat"],
    ),
    "turned": (
        lambda a: a.transpose(1, 3),
        ["Reshape", "Transpose", "Reshape", "Transpose", "Reshape"],
    ),
    "shuffled": (
        lambda a: F.channel_shuffle(a, 2),
        ["Reshape", "Transpose", "Reshape", "Transpose", "Reshape"],
    ),
    "nearest": (
        lambda a: F.interpolate(a, scale_factor=2),
        ["Reshape", "QCat", "Reshape", "QCat", "Reshape"],
    ),
    "rolled": (lambda a: a.roll(1, 3), ["Slice", "Slice", "QCat"]),
    "repeated": (lambda a: a.repeat(1, 2, 1, 1), ["QCat"]),
    "even": (lambda a: a[..., ::2], ["Reshape", "Slice", "Reshape"]),
    "moved": (lambda a: a[:1].transpose(0, 1), ["Slice", "Reshape"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_how_movements_are_written(name: str, tmp_path: Any) -> None:
    function, expected = WRITTEN[name]
    x = torch.randn(IMAGE)
    model = trained(on_conv(lambda a: function(a) * 1), x)
    proto = onnx.load(linger.export_onnx(model, (x,), tmp_path / "model.onnx", "linger"))
    around = [node.op_type for node in proto.graph.node]
    assert around[:2] == ["Quant", "QConv2d"]
    assert around[-2:] == ["QMul", "Dequant"]
    assert around[2:-2] == expected


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_shuffle_of_channels_under_its_own_name(groups: int) -> None:
    """Older exporters write it; reshapes and transposes take its place here."""
    node = helper.make_node("ShuffleChannel", ["codes"], ["y"], name="mix", groups=groups)
    node.domain = DOMAIN
    codes = np.arange(2 * 8 * 3).reshape(2, 8, 3, 1).astype(np.int8)
    runner = OnnxIntegerRunner(graph_of([node], [2, 8, 3, 1], {}))
    (found,) = runner.run({"x": codes.astype(np.float32) / 16}).values()
    wanted = codes.reshape(2, groups, 8 // groups, 3, 1).swapaxes(1, 2).reshape(codes.shape)
    assert np.array_equal(found, wanted)


def test_a_lookup_in_activations_is_refused(tmp_path: Any) -> None:
    x = torch.randn(IMAGE)
    places = torch.tensor([[[[1]], [[0]]]])
    model = Lambda(
        lambda self, x, i: self.conv(x).gather(1, i.expand(2, -1, 6, 6)) * 1,
        conv=nn.Conv2d(4, 4, 1),
    )
    trained(model, x, places)
    assert_integer_exact(model, x, places)
    with pytest.raises(UnsupportedError, match=r"`conv/conv2d/0`.*a lookup in activations"):
        linger.export_onnx(model, (x, places), tmp_path / "model.onnx", "linger")
