"""For each rule a model just inside the limit and one just outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Chain, Lambda

Made = tuple[nn.Module, tuple[Any, ...]]
Make = Callable[[], Made]

LUNA = ("venusa", "arcs", "venus", "mars")
ARCS = ("arcs", "mars")
DILATED = ("venusa", "arcs", "mars")
TFLITE = ("tflite", "tflite_single_rounding", "tflite_float_tables", "tflite_divided_mean")


@dataclass(frozen=True)
class Edge:
    """Two models on both sides of a limit.

    Args:
        rule: Name of the rule.
        inside: Makes the model that keeps the rule.
        outside: Makes the model that breaks it.
        platforms: Where the limit lies there.
        inside_fields: How the first model is quantized; None for not at all.
        outside_fields: How the second is.
    """

    rule: str
    inside: Make
    outside: Make
    platforms: tuple[str, ...] = LUNA
    inside_fields: dict[str, Any] | None = field(default=None)
    outside_fields: dict[str, Any] | None = field(default=None)


# --- models -------------------------------------------------------------------------------------


def maps(channels: int, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, channels, height, width)


def layer(make: Callable[[], nn.Module], *inputs: Tensor) -> Make:
    return lambda: (Chain(make()), inputs)


def conv(inputs: int, outputs: int, kernel: Any, size: tuple[int, int], **kwargs: Any) -> Make:
    return layer(lambda: nn.Conv2d(inputs, outputs, kernel, **kwargs), maps(inputs, *size))


def deconv(inputs: int, outputs: int, kernel: Any, size: tuple[int, int], **kwargs: Any) -> Make:
    return layer(lambda: nn.ConvTranspose2d(inputs, outputs, kernel, **kwargs), maps(inputs, *size))


def linear(features: int, outputs: int, *leading: int) -> Make:
    return layer(lambda: nn.Linear(features, outputs), torch.randn(*(leading or (1,)), features))


def behind_conv(
    function: Callable[[Tensor], Any], channels: int = 2, size: tuple[int, int] = (8, 8)
) -> Make:
    """A function of the result of a convolution, as large as its input."""

    def make() -> Made:
        model = Lambda(lambda m, x: function(m.conv(x)), conv=nn.Conv2d(channels, channels, 1))
        return model, (maps(channels, *size),)

    return make


def behind_convs(function: Callable[[Tensor, Tensor], Any]) -> Make:
    def make() -> Made:
        model = Lambda(
            lambda m, x: function(m.a(x), m.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)
        )
        return model, (maps(4, 6, 6),)

    return make


def behind_linear(function: Callable[[Tensor], Any], features: int = 4) -> Make:
    def make() -> Made:
        model = Lambda(lambda m, x: function(m.fc(x)), fc=nn.Linear(2, features))
        return model, (torch.randn(1, 2),)

    return make


def padded(function: Callable[[Any, Tensor], Tensor]) -> Make:
    def make() -> Made:
        model = Lambda(function, first=nn.Conv2d(2, 2, 1), second=nn.Conv2d(2, 2, 3))
        return model, (maps(2, 6, 6),)

    return make


def images(count: int) -> Make:
    """Several images in one sample, convolved one by one."""

    def make() -> Made:
        model = Lambda(lambda m, x: m.conv(x.flatten(0, 1)), conv=nn.Conv2d(2, 2, 3))
        return model, (torch.randn(1, count, 2, 6, 6),)

    return make


def lstm(run: Callable[..., Any] | None = None, **kwargs: Any) -> Make:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.lstm(x)[0]

    def make() -> Made:
        model = Lambda(
            run or forward,
            lstm=nn.LSTM(4, 4, batch_first=True, **kwargs),
            fc=nn.Linear(4, 4),
        )
        return model, (torch.randn(1, 5, 4),)

    return make


def recurrent(kind: type[nn.Module]) -> Make:
    def make() -> Made:
        model = Lambda(lambda m, x: m.rnn(x)[0], rnn=kind(4, 4, batch_first=True))
        return model, (torch.randn(1, 5, 4),)

    return make


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = torch.tensor([5])
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(m.lstm(sequence)[0], batch_first=True)[0]


def sequences(count: int) -> Make:
    """Several sequences in one sample."""

    def make() -> Made:
        model = Lambda(
            lambda m, x: m.lstm(x.flatten(0, 1))[0], lstm=nn.LSTM(4, 4, batch_first=True)
        )
        return model, (torch.randn(1, count, 5, 4),)

    return make


def product(rows: int, columns: int) -> Make:
    """A product with a second factor of ``rows x columns``."""

    def make() -> Made:
        model = Lambda(
            lambda m, x: m.left(x) @ m.right(x).reshape(1, rows, columns),
            left=nn.Linear(2, rows),
            right=nn.Linear(2, rows * columns),
        )
        return model, (torch.randn(1, 1, 2),)

    return make


def layers(count: int, features: int) -> Make:
    """Linear layers one behind the other."""
    return lambda: (
        Chain(*(nn.Linear(features, features) for _ in range(count))),
        (torch.randn(1, features),),
    )


def constant_mask(a: Tensor, b: Tensor) -> Tensor:
    return a.masked_fill(torch.ones(6, 6, dtype=torch.bool).tril(), 0.0) + b


def computed_mask(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a, b)


PLAIN = conv(2, 2, 3, (6, 6))
EIGHT: dict[str, Any] = {"activation_bits": 8}

# --- the table ----------------------------------------------------------------------------------

EDGES: list[Edge] = [
    # Geometry of convolutions
    Edge("kernel", conv(1, 1, 5, (8, 8)), conv(1, 1, (3, 6), (8, 8))),
    Edge(
        "dilated_kernel",
        conv(1, 1, (1, 12), (1, 30), dilation=(1, 2)),
        conv(1, 1, (1, 13), (1, 30), dilation=(1, 2)),
        DILATED,
    ),
    Edge("line_kernel", deconv(1, 1, 12, (16, 16)), deconv(1, 1, 13, (16, 16)), DILATED),
    Edge("line_kernel", deconv(1, 1, 5, (8, 8)), deconv(1, 1, 6, (8, 8)), ("venus",)),
    Edge(
        "line_kernel",
        layer(lambda: nn.Conv1d(2, 2, 12), torch.randn(1, 2, 20)),
        layer(lambda: nn.Conv1d(2, 2, 13), torch.randn(1, 2, 20)),
        ARCS,
    ),
    Edge(
        "dilation",
        conv(1, 1, 2, (16, 16), dilation=8),
        conv(1, 1, 2, (16, 16), dilation=3),
        DILATED,
    ),
    Edge("dilation", conv(1, 1, 2, (8, 8)), conv(1, 1, 2, (8, 8), dilation=2), ("venus",)),
    Edge("line_dilation", deconv(1, 1, 3, (8, 8)), deconv(1, 1, 3, (8, 8), dilation=2)),
    Edge(
        "line_dilation",
        layer(lambda: nn.Conv1d(2, 2, 3), torch.randn(1, 2, 20)),
        layer(lambda: nn.Conv1d(2, 2, 3, dilation=2), torch.randn(1, 2, 20)),
        ("arcs", "venus"),
    ),
    Edge("stride", conv(1, 1, 4, (8, 8), stride=4), conv(1, 1, 4, (8, 8), stride=3)),
    Edge("stride_beyond_kernel", conv(1, 1, 2, (8, 8), stride=2), conv(1, 1, 1, (8, 8), stride=2)),
    Edge(
        "padding",
        conv(1, 1, 12, (24, 24), dilation=2, padding=11),
        conv(1, 1, 12, (24, 24), dilation=2, padding=12),
        DILATED,
    ),
    Edge("padding", conv(1, 1, 5, (8, 8), padding=4), conv(1, 1, 5, (8, 8), padding=5), ("venus",)),
    Edge(
        "padding_beyond_kernel",
        conv(1, 1, 2, (8, 8), padding=2),
        conv(1, 1, 2, (8, 8), padding=(2, 3)),
    ),
    Edge(
        "kernel_beyond_input",
        conv(1, 1, (3, 5), (8, 5), padding=(0, 2)),
        conv(1, 1, (3, 5), (8, 4), padding=(0, 2)),
    ),
    Edge("kernel_beyond_input", deconv(1, 1, 4, (4, 4)), deconv(1, 1, 4, (4, 3))),
    Edge("batch_dimension", PLAIN, layer(lambda: nn.Conv2d(2, 2, 3), torch.randn(2, 6, 6))),
    Edge("images", images(1), images(2)),
    Edge(
        "depthwise_channels",
        conv(4, 4, 3, (6, 6), groups=4),
        conv(8, 4, 3, (6, 6), groups=4),
    ),
    Edge("groups", conv(4, 8, 3, (6, 6)), conv(4, 8, 3, (6, 6), groups=2)),
    # Buffers of convolutions
    Edge("rows", conv(256, 1, 4, (64, 64)), conv(256, 1, 4, (65, 65)), ("venusa", "venus")),
    Edge("rows", conv(64, 1, 4, (64, 64)), conv(64, 1, 4, (65, 65)), ARCS),
    Edge(
        "depthwise_rows",
        conv(128, 128, 4, (64, 64), groups=128),
        conv(128, 128, 4, (65, 65), groups=128),
        ("venusa", "venus"),
    ),
    Edge(
        "depthwise_rows",
        conv(64, 64, 4, (64, 64), groups=64),
        conv(64, 64, 4, (65, 65), groups=64),
        ARCS,
    ),
    Edge(
        "exchanged_axes",
        conv(256, 1, 4, (8, 64)),
        conv(256, 1, 4, (8, 65)),
        ("venusa", "venus"),
    ),
    Edge("exchanged_axes", conv(64, 1, 4, (8, 64)), conv(64, 1, 4, (8, 65)), ARCS),
    Edge(
        "depthwise_exchanged_axes",
        conv(128, 128, 4, (8, 64), groups=128),
        conv(128, 128, 4, (8, 65), groups=128),
        ("venusa", "venus"),
    ),
    Edge(
        "depthwise_exchanged_axes",
        conv(64, 64, 4, (8, 64), groups=64),
        conv(64, 64, 4, (8, 65), groups=64),
        ARCS,
    ),
    Edge("padded_rows", conv(2, 1, 4, (4, 2048)), conv(2, 1, 4, (4, 2049)), ("venusa", "venus")),
    Edge("padded_rows", conv(2, 1, 4, (4, 512)), conv(2, 1, 4, (4, 513)), ARCS),
    Edge(
        "padded_rows",
        layer(lambda: nn.Conv1d(8, 1, 3), torch.randn(1, 8, 2048)),
        layer(lambda: nn.Conv1d(8, 1, 3), torch.randn(1, 8, 2049)),
        ARCS,
    ),
    Edge(
        "padded_depthwise_rows",
        conv(2, 2, 4, (4, 2048), groups=2),
        conv(2, 2, 4, (4, 2049), groups=2),
        ("venus",),
    ),
    Edge(
        "padded_depthwise_rows",
        conv(2, 2, 4, (4, 512), groups=2),
        conv(2, 2, 4, (4, 513), groups=2),
        ARCS,
    ),
    Edge("weights", conv(64, 128, 2, (4, 4)), conv(64, 129, 2, (4, 4)), ("venusa", "venus")),
    Edge("weights", conv(64, 32, 2, (4, 4)), conv(64, 33, 2, (4, 4)), ARCS),
    Edge(
        "depthwise_weights",
        conv(904, 904, 3, (3, 3), groups=904),
        conv(905, 905, 3, (3, 3), groups=905),
        ARCS,
    ),
    Edge(
        "depthwise_weights",
        conv(3632, 3632, 3, (3, 3), groups=3632),
        conv(3633, 3633, 3, (3, 3), groups=3633),
        ("venus",),
    ),
    Edge("results", conv(1, 16, 1, (64, 64)), conv(1, 17, 1, (64, 64)), ("venusa", "venus")),
    Edge("results", conv(1, 8, 1, (64, 64)), conv(1, 9, 1, (64, 64)), ARCS),
    Edge("deconv_input", deconv(8, 1, 2, (128, 64)), deconv(8, 1, 2, (129, 64)), ("venus",)),
    Edge("deconv_weights", deconv(64, 32, 4, (4, 4)), deconv(64, 33, 4, (4, 4)), ("venus",)),
    Edge("deconv_packing", PLAIN, deconv(2, 2, 2, (4, 4)), ("venus",)),
    # Pools
    Edge(
        "pool_rows",
        behind_conv(lambda a: F.max_pool2d(a, 4), 256, (64, 64)),
        behind_conv(lambda a: F.max_pool2d(a, 4), 256, (65, 65)),
        ("venusa", "venus"),
    ),
    Edge(
        "pool_rows",
        behind_conv(lambda a: F.avg_pool2d(a, 4), 64, (64, 64)),
        behind_conv(lambda a: F.avg_pool2d(a, 4), 64, (65, 65)),
        ARCS,
    ),
    Edge(
        "pool_rows",
        behind_conv(lambda a: F.avg_pool2d(a, 6, 4), 64, (80, 80)),
        behind_conv(lambda a: F.avg_pool2d(a, 5, 4), 64, (80, 80)),
        ARCS,
    ),
    Edge(
        "pool_kernel",
        behind_conv(lambda a: F.max_pool2d(a, 12), 2, (32, 32)),
        behind_conv(lambda a: F.max_pool2d(a, 13), 2, (32, 32)),
        DILATED,
    ),
    Edge(
        "pool_kernel",
        behind_conv(lambda a: F.max_pool2d(a, 5), 2, (32, 32)),
        behind_conv(lambda a: F.max_pool2d(a, 6), 2, (32, 32)),
        ("venus",),
    ),
    Edge(
        "pool_kernel",
        behind_conv(lambda a: F.max_pool2d(a, (4, 32)), 2, (32, 32)),
        behind_conv(lambda a: F.max_pool2d(a, (4, 31)), 2, (32, 32)),
    ),
    Edge(
        "pool_padding",
        behind_conv(lambda a: F.max_pool2d(a, 22, padding=11), 2, (32, 32)),
        behind_conv(lambda a: F.max_pool2d(a, 24, padding=12), 2, (32, 32)),
        DILATED,
    ),
    Edge(
        "pool_padding",
        behind_conv(lambda a: F.max_pool2d(a, 8, padding=4), 2, (32, 32)),
        behind_conv(lambda a: F.max_pool2d(a, 10, padding=5), 2, (32, 32)),
        ("venus",),
    ),
    Edge(
        "pool_stride",
        behind_conv(lambda a: F.max_pool2d(a, 2, 2)),
        behind_conv(lambda a: F.avg_pool2d(a, 2, 3)),
    ),
    Edge(
        "pool_dilation",
        behind_conv(lambda a: F.max_pool2d(a, 2, dilation=1)),
        behind_conv(lambda a: F.max_pool2d(a, 2, dilation=2)),
    ),
    Edge(
        "ceil_mode",
        behind_conv(lambda a: F.max_pool2d(a, 3, 2, ceil_mode=True), 2, (7, 7)),
        behind_conv(lambda a: F.max_pool2d(a, 3, 2, ceil_mode=True), 2, (8, 8)),
    ),
    Edge(
        "count_include_pad",
        behind_conv(lambda a: F.avg_pool2d(a, 3, 2, 0, count_include_pad=False)),
        behind_conv(lambda a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False)),
    ),
    Edge(
        "divisor",
        behind_conv(lambda a: F.avg_pool2d(a, 2, divisor_override=4)),
        behind_conv(lambda a: F.avg_pool2d(a, 2, divisor_override=3)),
    ),
    Edge(
        "global_average",
        behind_conv(lambda a: a.mean((2, 3)), 1, (15, 17)),
        behind_conv(lambda a: a.mean((2, 3)), 1, (15, 18)),
        DILATED,
    ),
    Edge(
        "global_average",
        behind_conv(lambda a: a.mean((2, 3)), 1, (16, 32)),
        behind_conv(lambda a: a.mean((2, 3)), 1, (16, 33)),
        DILATED,
    ),
    # Widths
    *(
        Edge("operand_bits", PLAIN, PLAIN, LUNA, EIGHT, {"activation_bits": bits})
        for bits in (7, 9)
    ),
    Edge("weight_bits", PLAIN, PLAIN, LUNA, {"weight_bits": 8}, {"weight_bits": 9}),
    Edge("result_bits", PLAIN, PLAIN, LUNA, {"output_bits": 8}, {"output_bits": 9}),
    Edge("result_bits", PLAIN, PLAIN, LUNA, {"output_bits": 8}, {"output_bits": None}),
    Edge(
        "linear_bits",
        linear(4, 4),
        linear(4, 4),
        DILATED,
        {"output_bits": None},
        {"output_bits": 16},
    ),
    Edge(
        "product_bits",
        product(4, 4),
        product(4, 4),
        LUNA,
        {"output_bits": 8},
        {"output_bits": 16},
    ),
    Edge(
        "requantize",
        layers(2, 4),
        layers(2, 4),
        LUNA,
        {"output_bits": 8},
        {"output_bits": 16},
    ),
    Edge(
        "curve_bits",
        behind_linear(torch.sigmoid),
        behind_linear(torch.sigmoid),
        ARCS,
        EIGHT,
        {"activation_bits": 16},
    ),
    Edge(
        "curve_bits",
        behind_linear(torch.tanh),
        behind_linear(torch.tanh),
        ("venus",),
        {"activation_bits": 16},
        {"activation_bits": 12},
    ),
    Edge(
        "curve_result_bits",
        behind_linear(torch.sigmoid),
        behind_linear(torch.sigmoid),
        ("arcs", "venus", "mars"),
        EIGHT,
        {"output_bits": 16},
    ),
    # Other layers
    Edge("linear_rank_compared", linear(4, 4, 1, 2), linear(4, 4, 1, 2, 3)),
    Edge("linear_rank", linear(4, 4, 1), layer(lambda: nn.Linear(4, 4), torch.randn(4))),
    Edge("linear_features", linear(81920, 1), linear(81921, 1), ("venusa",)),
    Edge("linear_features", linear(163840, 1), linear(163841, 1), ARCS),
    Edge("linear_features", linear(16384, 1), linear(16385, 1), ("venus",)),
    Edge("prefetched", linear(1024, 382), linear(1024, 383), DILATED),
    Edge("prefetched", linear(1024, 637), linear(1024, 638), ("venus",)),
    Edge("prefetched", conv(256, 1504, 1, (2, 2)), conv(256, 1536, 1, (2, 2)), DILATED),
    Edge(
        "softmax_length",
        behind_linear(lambda a: a.softmax(-1), 2048),
        behind_linear(lambda a: a.softmax(-1), 2049),
    ),
    Edge(
        "layer_norm_length",
        behind_linear(lambda a: F.layer_norm(a, (362,)), 362),
        behind_linear(lambda a: F.layer_norm(a, (363,)), 363),
        DILATED,
    ),
    Edge(
        "layer_norm_eps",
        behind_linear(lambda a: F.layer_norm(a, (4,))),
        behind_linear(lambda a: F.layer_norm(a, (4,), eps=1e-3)),
        DILATED,
    ),
    Edge(
        "cat_operands",
        behind_linear(lambda a: torch.cat([a] * 64, 1)),
        behind_linear(lambda a: torch.cat([a] * 65, 1)),
    ),
    Edge(
        "add_shapes",
        behind_convs(lambda a, b: a + b),
        behind_convs(lambda a, b: a + b.mean((2, 3), keepdim=True)),
    ),
    Edge(
        "mul_shapes",
        behind_convs(lambda a, b: a * b.mean((2, 3), keepdim=True)),
        behind_convs(lambda a, b: a * b.mean(1, keepdim=True)),
    ),
    Edge("computed_places", behind_convs(constant_mask), behind_convs(computed_mask)),
    Edge("slice_step", behind_conv(lambda a: a[:, :, 1:7]), behind_conv(lambda a: a[:, :, ::2])),
    Edge(
        "pieces",
        behind_linear(lambda a: a.flip(1), 64),
        behind_linear(lambda a: a.flip(1), 65),
    ),
    Edge(
        "transpose",
        behind_conv(lambda a: a.permute(0, 2, 3, 1)),
        behind_conv(lambda a: a.permute(3, 2, 1, 0)),
    ),
    Edge(
        "transpose",
        behind_conv(lambda a: a.transpose(2, 3)),
        behind_conv(lambda a: a.transpose(1, 2)),
        ("venusa",),
    ),
    Edge(
        "pad",
        padded(lambda m, x: m.second(F.pad(m.first(x), (1, 0, 2, 1)))),
        padded(lambda m, x: F.pad(m.second(m.first(x)), (1, 0, 2, 1))),
    ),
    Edge(
        "pad",
        padded(lambda m, x: m.second(F.pad(m.first(x), (1, 1)))),
        padded(lambda m, x: m.second(F.pad(m.first(x), (1, 1), value=0.5))),
    ),
    Edge("argmax", behind_linear(lambda a: a), behind_linear(lambda a: (a, a.argmax(-1)))),
    Edge("argmax", behind_linear(lambda a: a.max(-1)[0]), behind_linear(lambda a: a.max(-1)[1])),
    Edge(
        "returned_once",
        behind_linear(lambda a: (a, a.relu())),
        behind_linear(lambda a: (a, a)),
    ),
    Edge("glu", behind_linear(lambda a: a), behind_linear(lambda a: F.glu(a))),
    Edge("second_factor", product(128, 256), product(128, 257), ("venus",)),
    Edge(
        "not_compared",
        behind_linear(lambda a: a),
        behind_linear(lambda a: a.softmax(-1)),
        ("venus",),
    ),
    Edge("lstm", linear(4, 4), lstm(), ("venus",)),
    Edge("lstm_batch", sequences(1), sequences(2), DILATED),
    Edge(
        "lstm_state",
        lstm(),
        lstm(lambda m, x: m.lstm(x, (m.fc(x[:, :1]).transpose(0, 1), x[:1, :1] * 0))[0]),
        DILATED,
    ),
    Edge("lstm_projection", lstm(), lstm(proj_size=2), DILATED),
    Edge("lstm_steps", lstm(), lstm(packed), DILATED),
    Edge("lstm_packing", linear(4, 4), lstm(), DILATED),
    # Every engine computes another cell than PyTorch's, or none.
    Edge("unsupported_op", linear(4, 4), recurrent(nn.GRU)),
    Edge("unsupported_op", linear(4, 4), recurrent(nn.RNN)),
    Edge("unsupported_op", behind_linear(F.relu), behind_linear(F.relu6)),
    Edge("unsupported_op", behind_linear(lambda a: a - 0.5), behind_linear(lambda a: a - a.relu())),
    Edge("unsupported_op", behind_linear(lambda a: a / 3), behind_linear(lambda a: a / a.relu())),
    Edge("unsupported_op", behind_linear(lambda a: a**2), behind_linear(lambda a: a**3)),
    Edge(
        "result_size",
        behind_linear(lambda a: a.masked_fill(torch.eye(4)[:1] > 0, 0.0)),
        behind_linear(lambda a: a.masked_select(torch.ones(1, 4, dtype=torch.bool))),
        (*LUNA, "onnxruntime"),
    ),
    Edge("float_op", behind_linear(F.relu), behind_linear(torch.atan)),
    # The whole model
    Edge(
        "share_memory",
        behind_conv(F.relu, 1, (383, 512)),
        behind_conv(F.relu, 1, (384, 512)),
        DILATED,
    ),
    Edge(
        "share_memory",
        behind_conv(F.relu, 1, (639, 512)),
        behind_conv(F.relu, 1, (640, 512)),
        ("venus",),
    ),
    Edge("psram", layers(28, 544), layers(29, 544)),
    # Settings
    Edge("granularity", PLAIN, PLAIN, LUNA, EIGHT, {"granularity": "channel"}),
    Edge("rounding", PLAIN, PLAIN, LUNA, EIGHT, {"rounding": "half_even"}),
    Edge("other_platform", PLAIN, PLAIN, LUNA, EIGHT, {"platform": "onnxruntime"}),
    # onnxruntime
    Edge("float_op", behind_linear(F.relu6), behind_linear(torch.atan), ("onnxruntime",)),
    Edge(
        "accumulator",
        layer(lambda: nn.ConvTranspose1d(1023, 1, 1), torch.randn(1, 1023, 2)),
        layer(lambda: nn.ConvTranspose1d(1024, 1, 1), torch.randn(1, 1024, 2)),
        ("onnxruntime",),
    ),
    Edge(
        "accumulator",
        linear(2000, 2),
        linear(2000, 2),
        ("onnxruntime",),
        EIGHT,
        {"activation_bits": 16},
    ),
    Edge(
        "sums",
        behind_conv(lambda a: a.mean((2, 3)), 1, (362, 362)),
        behind_conv(lambda a: a.mean((2, 3)), 1, (363, 363)),
        ("onnxruntime",),
    ),
    Edge("packed_sequence", lstm(), lstm(packed), ("onnxruntime",)),
    Edge("rounding", PLAIN, PLAIN, ("onnxruntime",), EIGHT, {"rounding": "half_up"}),
    Edge("other_platform", PLAIN, PLAIN, ("onnxruntime",), EIGHT, {"platform": "arcs"}),
    Edge("other_platform", PLAIN, PLAIN, ("mlu",), {"output_bits": None}, {"platform": "arcs"}),
    # TFLite
    Edge("weight_bits", PLAIN, PLAIN, TFLITE, {"weight_bits": 4}, {"weight_bits": 9}),
    Edge("unsupported_op", behind_linear(F.gelu), behind_linear(F.mish), TFLITE),
    Edge("unsupported_op", behind_linear(F.relu6), behind_linear(lambda a: a / a.relu()), TFLITE),
    Edge("unsupported_op", behind_linear(lambda a: a - a.relu()), behind_linear(F.silu), TFLITE),
    Edge(
        "unsupported_op",
        behind_linear(lambda a: torch.maximum(a, a.relu())),
        behind_linear(torch.sin),
        TFLITE,
    ),
    Edge("float_op", behind_linear(F.relu6), behind_linear(torch.atan), TFLITE),
    Edge("float_op", behind_linear(F.relu6), behind_linear(torch.neg), TFLITE, EIGHT, EIGHT),
    Edge("rounding", PLAIN, PLAIN, TFLITE, EIGHT, {"rounding": "half_up"}),
    Edge("other_platform", PLAIN, PLAIN, TFLITE, EIGHT, {"platform": "arcs"}),
]
