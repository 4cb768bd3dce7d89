"""What LISTENAI's LUNA engines take, and their packer.

Kernels, strides, widths and ops were measured by packing small graphs with pythinker 3.0.4 and by
running them in its simulation of the engines; each rule says how it is known.
"""

from __future__ import annotations

from lightning_linger.platforms.luna_windows import pool_rules, size_rules, window_rules
from lightning_linger.platforms.rules import (
    CONVOLUTIONS,
    CURVES,
    NARROW,
    PREFETCHED,
    RESULT_SIZE,
    AtLeast,
    AtMost,
    Engine,
    Limits,
    Never,
    OneOf,
    Rule,
    Workspace,
    setting_rules,
)


def _widths(
    linear: tuple[int, ...], product: tuple[int, ...], curve: tuple[int, ...]
) -> tuple[Rule, ...]:
    """Return how many bits layers read and write.

    Args:
        linear: What a linear layer may write.
        product: What a product of two activations may write.
        curve: What the operand of a curve may have.
    """
    rules = [
        Rule(
            "operand_bits",
            NARROW,
            "operand_bits",
            OneOf((8,)),
            "operands have {allowed} bits",
            "use activation_bits=8, and output_bits=8 for the layers before it",
        ),
        Rule(
            "weight_bits",
            (*CONVOLUTIONS, "linear", "layer_norm", "embedding", "lstm"),
            "weight_bits",
            OneOf((8,)),
            "weights have up to {allowed} bits",
            "use weight_bits=8",
            evidence="engine",
        ),
        Rule(
            "result_bits",
            tuple(kind for kind in NARROW if kind not in ("linear", "matmul")),
            "result_bits",
            OneOf((8,)),
            "results have {allowed} bits",
            "use output_bits=8",
            evidence="engine",
        ),
        Rule(
            "product_bits",
            ("matmul",),
            "result_bits",
            OneOf(product),
            "the product of two activations has {allowed} bits",
            "use output_bits=8",
            evidence="engine",
        ),
        Rule(
            "requantize",
            ("requantize",),
            "narrowing",
            AtMost(0),
            "codes are never brought to a narrower storage",
            "give the layer before it the output_bits that this one reads",
            evidence="engine",
        ),
    ]
    if linear != (8, 16, 32):  # all there are
        rules.append(
            Rule(
                "linear_bits",
                ("linear",),
                "result_bits",
                OneOf(linear),
                "the result of a linear layer has {allowed} bits; float results come from 32",
                "use output_bits=8, or None for float results",
                evidence="engine",
            )
        )
    if curve:
        rules += [
            Rule(
                "curve_bits",
                CURVES,
                "operand_bits",
                OneOf(curve),
                "the operand of a sigmoid or a tanh has {allowed} bits",
                "use activation_bits=8 for it",
                evidence="engine",
            ),
            Rule(
                "curve_result_bits",
                CURVES,
                "result_bits",
                OneOf((8,)),
                "the result of a sigmoid or a tanh has {allowed} bits",
                "use output_bits=8 for it",
                evidence="engine",
            ),
        ]
    return tuple(rules)


def _layers(engine: Engine) -> tuple[Rule, ...]:
    """Return the limits of everything that is no convolution or pool."""
    return (
        Rule(
            "linear_rank",
            ("linear",),
            "rank",
            AtLeast(2),
            "the input of a linear layer has {allowed} dimensions or more",
            "call the model with a batch of one",
        ),
        Rule(
            "linear_rank_compared",
            ("linear",),
            "rank",
            AtMost(3),
            "nobody compared the results of linear layers on more than {allowed} dimensions",
            "flatten the leading ones before it",
            severity="warning",
        ),
        Rule(
            "linear_features",
            ("linear",),
            "features",
            AtMost(engine.features),
            "a linear layer has up to {allowed} input features; the packer never returns from more",
            "pool before it",
        ),
        Rule(
            "prefetched",
            PREFETCHED,
            "prefetched",
            AtMost(engine.share_memory),
            "weights and biases of a layer are fetched whole into the {allowed} bytes of share "
            "memory",
            "use two smaller layers side by side and join their results",
        ),
        Rule(
            "softmax_length",
            ("softmax", "log_softmax"),
            "length",
            AtMost(2048),
            "a softmax runs over up to {allowed} values",
            "split the axis",
        ),
        Rule(
            "cat_operands",
            ("cat",),
            "operands",
            AtMost(64),
            "up to {allowed} tensors are joined at once",
            "join in two steps",
            evidence="export",
        ),
        Rule(
            "add_shapes",
            ("add",),
            "shapes",
            Never(),
            "both operands of a sum have one shape, or one is a number",
            "expand the smaller operand",
            when=("broadcast",),
            evidence="engine",
        ),
        Rule(
            "mul_shapes",
            ("mul",),
            "shapes",
            Never(),
            "both factors have one shape, or one is a number, or has one value for each leading "
            "index ([N, C, 1, 1] beside [N, C, H, W])",
            "expand the smaller operand",
            when=("broadcast",),
            evidence="engine",
        ),
        Rule(
            "computed_places",
            ("slice", "select"),
            "computed",
            OneOf((False,)),
            "places and masks are constants of the model",
            "keep them in a buffer, or choose outside the model",
            evidence="export",
        ),
        Rule(
            "slice_step",
            ("slice",),
            "steps",
            OneOf((1,)),
            "slices have step {allowed}; others are written as several moves",
            "use a stride or a pool in the layer before it",
            severity="warning",
            evidence="engine",
        ),
        Rule(
            "pieces",
            ("move",),
            "pieces",
            AtMost(64),
            "values are moved in up to {allowed} pieces",
            "move them outside the model",
            evidence="export",
        ),
        Rule(
            "pad",
            ("pad",),
            "op",
            Never(),
            "zeros are padded by the convolution behind them; no other padding runs",
            "use the `padding` of a convolution",
        ),
        Rule(
            "argmax",
            ("argmax",),
            "op",
            Never(),
            "argmax runs outside the model: the engine writes values and places into one int32 "
            "tensor",
            "return the values and take their argmax outside",
            evidence="sources",
        ),
        Rule(
            "returned_once",
            ("identity",),
            "op",
            Never(),
            "a value is returned once",
            "return it once, and use it twice outside the model",
        ),
        Rule(
            "glu",
            ("glu",),
            "op",
            Never(),
            "no packer knows a gated linear unit",
            "use a product with a sigmoid where the engine has one, or a layer with a ReLU",
        ),
        RESULT_SIZE,
        Rule(
            "unsupported_op",
            ("unsupported",),
            "op",
            Never(),
            "the engine has no kernel for this op, or a wrong one",
            "leave it out of the model that runs on the engine",
            evidence="engine",
        ),
        Rule(
            "unverified_op",
            ("unverified",),
            "op",
            Never(),
            "nothing is known about this op on the engine",
            "export and pack a model with it before training",
            severity="warning",
            evidence="sources",
        ),
        Rule(
            "float_op",
            ("float",),
            "why",
            Never(),
            "everything between input and output runs in integers",
            "quantize it, or move it out of the model",
            evidence="packer",
        ),
        Rule(
            "share_memory",
            ("model",),
            "share_memory",
            AtMost(engine.share_memory),
            "activations, workspace and prefetched weights take up to {allowed} bytes of share "
            "memory (an estimate from below)",
            "use smaller activations there",
        ),
        Rule(
            "psram",
            ("model",),
            "psram",
            AtMost(engine.psram),
            "weights, biases and activations that do not fit into share memory take up to "
            "{allowed} bytes of PSRAM (an estimate)",
            "use fewer weights",
        ),
    )


# Permutations of axes that an engine has; the others are written as several.
_TRANSPOSES = (
    *((1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)),
    *((0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2), (1, 0, 2, 3)),
)
_MORE_TRANSPOSES = (*_TRANSPOSES, (0, 2, 1, 3), (0, 3, 2, 1))


def _transpose(orders: tuple[tuple[int, ...], ...]) -> Rule:
    return Rule(
        "transpose",
        ("transpose",),
        "order",
        OneOf(orders),
        "a transpose has one of the orders {allowed}; others are written as several moves",
        "keep one order of axes in the model",
        severity="warning",
        evidence="engine",
    )


_GLOBAL_AVERAGE = Rule(
    "global_average",
    ("avg_pool",),
    "averaged_per_channel",
    AtMost(64),
    "an average over a whole map of a size that is no power of two takes up to 4 values per "
    "channel, and channels are repeated up to {allowed} times for more",
    "average over a power of two of values, or pool in two steps",
    when=("global",),
    evidence="engine",
)
_NORM = (
    Rule(
        "layer_norm_length",
        ("layer_norm",),
        "length",
        AtMost(362),
        "a layer norm runs over up to {allowed} values: n^2 * 2^14 stays in 32 bits",
        "use activation_bits=7 or fewer for it, or a batch norm",
        evidence="export",
    ),
    Rule(
        "layer_norm_eps",
        ("layer_norm",),
        "eps",
        OneOf((1e-5,)),
        "eps of a layer norm is {allowed}",
        "use eps=1e-5; the engine takes it in any case",
        severity="warning",
        evidence="engine",
    ),
)
_LSTM = (
    Rule(
        "lstm_batch",
        ("lstm",),
        "batch",
        OneOf((1,)),
        "an LSTM runs over {allowed} sequence at a time",
        "check and export with a batch of one",
        evidence="engine",
    ),
    Rule(
        "lstm_state",
        ("lstm",),
        "op",
        Never(),
        "an LSTM starts from zeros",
        "do without the second argument of the layer",
        when=("initial_state",),
        evidence="export",
    ),
    Rule(
        "lstm_projection",
        ("lstm",),
        "op",
        Never(),
        "an LSTM has no projection",
        "use one without `proj_size`, and a linear layer behind it",
        when=("projection",),
        evidence="export",
    ),
    Rule(
        "lstm_steps",
        ("lstm",),
        "op",
        Never(),
        "an LSTM runs over a whole sequence [1, T, I] that is not packed",
        "use `nn.LSTM` on a padded sequence",
        when=("steps",),
        evidence="export",
    ),
    Rule(
        "lstm_packing",
        ("lstm",),
        "op",
        Never(),
        "a model with an LSTM is packed with `--dma_prefetch False`",
        "`lightning_linger.export.packer.pack` does; by hand pass it, or the engine breaks off",
        severity="note",
        evidence="engine",
    ),
)
_NOT_PACKED = Rule(
    "not_packed",
    ("model",),
    "packer",
    Never(),
    "there is a packer for the engine; that of pythinker 3.0.4 knows its name and refuses its "
    "layers, and these limits are those of arcs",
    "ask the maker of the chip for a packer",
    severity="warning",
)


def _luna(
    platform: str,
    engine: Engine,
    *more: Rule,
    linear: tuple[int, ...] = (8, 32),
    product: tuple[int, ...] = (8, 32),
    curve: tuple[int, ...] = (8,),
    about: str = "",
) -> Limits:
    """Return the limits of one of LISTENAI's LUNA engines."""
    rules = (
        *window_rules(engine),
        *size_rules(engine),
        *pool_rules(engine),
        *_widths(linear, product, curve),
        *_layers(engine),
        *setting_rules(platform, "tensor", "half_up"),
        *more,
    )
    return Limits(platform, rules, engine, about)


_ARCS = Engine(
    share_memory=384 << 10,
    rows=16384,
    depthwise_rows=16384,
    padded_rows=16384,
    padded_depthwise_rows=16384,
    columns=4,
    weights=8192,
    depthwise_weights=8192,
    outputs=32768,
    large_pool=5,
    features=163840,
    workspace=Workspace(linear=(1, 1), softmax=(4, 4)),
)
_VENUSA = Engine(
    share_memory=384 << 10,
    channels=4,
    padded_depthwise_channels=4,
    weight_channels=4,
    depthwise_weight_rows=2,
)
_VENUS = Engine(
    share_memory=640 << 10,
    line_kernel=5,
    padding=4,
    dilations=(1,),
    padded_depthwise_rows=65536,
    depthwise_weights=32768,
    depthwise_weight_channels=16,
    features=16384,
    external_split=True,
    workspace=Workspace(linear=(0, 4), softmax=(0, 2), average=2, curve=2, recurrent_weights=False),
)
_VENUS_RULES = (
    _transpose(_MORE_TRANSPOSES),
    Rule(
        "deconv_input",
        ("deconv",),
        "whole_input",
        AtMost(65536),
        "the input of a transposed convolution takes up to {allowed} bytes, channels rounded up to "
        "8, columns to 8 times the stride",
        "use a smaller input, or fewer channels",
    ),
    Rule(
        "deconv_weights",
        ("deconv",),
        "weights",
        AtMost(32768),
        "the weights of a transposed convolution take up to {allowed} bytes",
        "use fewer channels, or a smaller kernel",
    ),
    Rule(
        "deconv_packing",
        ("deconv",),
        "op",
        Never(),
        "a model with a transposed convolution is packed with `-m params:share-mem`",
        "`lightning_linger.export.packer.pack` does; by hand pass it, or the packer breaks off",
        severity="note",
        evidence="engine",
    ),
    Rule(
        "second_factor",
        ("matmul",),
        "second_factor",
        AtMost(32768),
        "a matrix of the second factor takes up to {allowed} bytes, rows rounded up to 8, columns "
        "to 4",
        "use smaller matrices",
        evidence="sources",
    ),
    Rule(
        "lstm",
        ("lstm",),
        "op",
        Never(),
        "no LSTM: this engine's has curves of its own, which are not known exactly",
        "use a convolutional model, or another platform",
        evidence="sources",
    ),
    Rule(
        "not_compared",
        ("softmax", "log_softmax"),
        "op",
        Never(),
        "softmax and log_softmax run in a library whose results nobody could compare",
        "compare them on a board, or take them out of the model",
        severity="warning",
        evidence="sources",
    ),
)


LUNA_LIMITS: tuple[Limits, ...] = (
    _luna(
        "venusa",
        _VENUSA,
        *(_transpose(_TRANSPOSES), _GLOBAL_AVERAGE, *_NORM, *_LSTM),
        curve=(),
        about="A LUNA engine; graphs spell it `venusA`.",
    ),
    _luna(
        "arcs",
        _ARCS,
        *(_transpose(_MORE_TRANSPOSES), _GLOBAL_AVERAGE, *_NORM, *_LSTM),
        about="A LUNA engine.",
    ),
    _luna(
        "venus",
        _VENUS,
        *_VENUS_RULES,
        linear=(8, 16, 32),
        product=(8,),
        curve=(8, 16),
        about="A LUNA engine, the oldest of them.",
    ),
    _luna(
        "mars",
        _ARCS,
        *(_transpose(_MORE_TRANSPOSES), _GLOBAL_AVERAGE, *_NORM, *_LSTM, _NOT_PACKED),
        about="A LUNA engine. Its limits are those of arcs: nothing was measured for it.",
    ),
)
