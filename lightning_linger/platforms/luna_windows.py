"""What the LUNA engines' convolutions and pools take: geometry, and the sizes of their buffers."""

from __future__ import annotations

from lightning_linger.platforms.rules import (
    CONVOLUTIONS,
    AtMost,
    Between,
    Engine,
    Never,
    OneOf,
    Rule,
)

_SPLIT = "smaller layers run in one pass; the result is the same"


def window_rules(engine: Engine) -> tuple[Rule, ...]:
    """Return the limits of convolutions."""
    dilated: tuple[Rule, ...] = ()
    if engine.dilations != (1,):
        dilated = (
            Rule(
                "dilated_kernel",
                ("conv",),
                "kernel",
                Between(1, engine.dilated_kernel),
                "a kernel with dilation is {allowed} high and wide",
                "use a smaller kernel, or several layers",
                when=("dilated",),
            ),
        )
    return (
        Rule(
            "kernel",
            ("conv",),
            "kernel",
            Between(1, engine.kernel),
            "a kernel is {allowed} high and wide",
            "stack smaller kernels: two of 3 see as far as one of 5",
            unless=("dilated",) if dilated else (),
        ),
        *dilated,
        Rule(
            "line_kernel",
            ("conv1d", "deconv"),
            "kernel",
            Between(1, engine.line_kernel),
            "the kernel of a transposed or a one-dimensional convolution is {allowed} long",
            "use a smaller kernel, or several layers",
        ),
        Rule(
            "dilation",
            ("conv",),
            "dilation",
            OneOf(engine.dilations),
            "dilation is {allowed}",
            "use one of these, or a larger kernel",
        ),
        Rule(
            "line_dilation",
            ("conv1d", "deconv"),
            "dilation",
            OneOf((1,)),
            "dilation of a transposed or a one-dimensional convolution is {allowed}",
            "do without, or use a two-dimensional convolution of height 1",
            evidence="sources",
        ),
        Rule(
            "stride",
            CONVOLUTIONS,
            "stride",
            OneOf((1, 2, 4)),
            "a stride is {allowed}",
            "use one of these, or a pool behind the layer",
        ),
        Rule(
            "stride_beyond_kernel",
            CONVOLUTIONS,
            "stride_beyond_kernel",
            AtMost(0),
            "a stride is no longer than the kernel",
            "use a kernel as long as the stride, or an average pool in front of the layer",
        ),
        Rule(
            "padding",
            CONVOLUTIONS,
            "padding",
            Between(0, engine.padding),
            "there are {allowed} zeros at an edge",
            "pad less",
        ),
        Rule(
            "padding_beyond_kernel",
            CONVOLUTIONS,
            "padding_beyond_kernel",
            AtMost(0),
            "there are no more zeros at an edge than the kernel is wide",
            "pad less",
        ),
        Rule(
            "kernel_beyond_input",
            ("conv", "deconv"),
            "kernel_beyond_input",
            AtMost(0),
            "the kernel fits into the input with its zeros; the packer adds those above and below "
            "a convolution's input to the width, and those at the sides to the height",
            "use a smaller kernel, or zeros at all edges",
        ),
        Rule(
            "batch_dimension",
            (*CONVOLUTIONS, "max_pool", "avg_pool"),
            "op",
            Never(),
            "inputs have a batch dimension",
            "call the model with a batch of one",
            when=("unbatched",),
            evidence="export",
        ),
        Rule(
            "images",
            (*CONVOLUTIONS, "max_pool", "avg_pool"),
            "images",
            OneOf((1,)),
            "{allowed} image is convolved or pooled for each sample: the engine computes the first",
            "give the others a dimension of their own, or use one call for each",
            evidence="engine",
        ),
        Rule(
            "depthwise_channels",
            ("conv",),
            "channels_per_group",
            OneOf((1,)),
            "with as many groups as output channels there are as many input channels",
            "use fewer groups, or as many input channels as groups",
            when=("depthwise",),
        ),
        Rule(
            "groups",
            ("conv",),
            "groups",
            AtMost(1),
            "groups are 1, or as many as channels; others run one after another, and are joined",
            _SPLIT,
            severity="warning",
            when=("grouped",),
            evidence="engine",
        ),
    )


def size_rules(engine: Engine) -> tuple[Rule, ...]:
    """Return what the buffers of convolutions hold."""
    rules = [
        Rule(
            "rows",
            ("conv", "deconv"),
            "rows",
            AtMost(engine.rows),
            "as many input rows as the kernel is high take up to {allowed} bytes, channels rounded "
            f"up to {engine.channels}, columns to 8 times the stride; or as many columns as it is "
            "wide do",
            "use fewer channels or columns, or a lower kernel",
            unless=("depthwise",),
        ),
        Rule(
            "depthwise_rows",
            ("conv",),
            "rows",
            AtMost(engine.depthwise_rows),
            "as many input rows as a depthwise kernel is high take up to {allowed} bytes, rounded "
            "up in the same way; or as many columns as it is wide do",
            "use fewer channels or columns, or a lower kernel",
            when=("depthwise",),
        ),
        Rule(
            "exchanged_axes",
            ("conv", "deconv"),
            "straight_rows",
            AtMost(engine.rows),
            "as many input rows as the kernel is high take up to {allowed} bytes; else the input "
            "and the result are transposed",
            "exchange height and width of the model's input",
            severity="warning",
            unless=("depthwise",),
        ),
        Rule(
            "depthwise_exchanged_axes",
            ("conv",),
            "straight_rows",
            AtMost(engine.depthwise_rows),
            "as many input rows as a depthwise kernel is high take up to {allowed} bytes; else the "
            "input and the result are transposed",
            "exchange height and width of the model's input",
            severity="warning",
            when=("depthwise",),
        ),
        Rule(
            "padded_rows",
            CONVOLUTIONS,
            "padded_rows",
            AtMost(engine.padded_rows),
            "the input rows under a kernel take up to {allowed} bytes in memory, channels rounded "
            f"up to {engine.padded_channels}, columns to {engine.columns} times the stride",
            "use fewer columns, or a lower kernel",
            unless=("depthwise",),
        ),
        Rule(
            "weights",
            CONVOLUTIONS,
            "weights",
            AtMost(engine.weights),
            "weights of up to {allowed} bytes run in one pass; output channels are rounded up to "
            f"{engine.weight_channels}, input channels to 8",
            _SPLIT,
            severity="warning",
            unless=("depthwise",),
            evidence="engine",
        ),
        Rule(
            "results",
            CONVOLUTIONS,
            "results",
            AtMost(engine.outputs),
            "results of up to {allowed} bytes run in one pass",
            _SPLIT,
            severity="warning",
            evidence="engine",
        ),
        Rule(
            "pool_rows",
            ("max_pool", "avg_pool"),
            "rows",
            AtMost(engine.rows),
            "as many input rows as a pool is high take up to {allowed} bytes, or as many columns "
            "as it is wide do",
            "use fewer channels or columns, or a lower pool",
        ),
    ]
    if engine.padded_depthwise_channels > engine.channels:
        rules.append(
            Rule(
                "padded_depthwise_rows",
                ("conv",),
                "padded_rows",
                AtMost(engine.padded_depthwise_rows),
                "the input rows under a depthwise kernel take up to {allowed} bytes in memory, "
                f"channels rounded up to {engine.padded_depthwise_channels}, columns to "
                f"{engine.columns} times the stride",
                "use fewer columns, or a lower kernel",
                when=("depthwise",),
            )
        )
    if engine.depthwise_weights is not None:
        rules.append(
            Rule(
                "depthwise_weights",
                ("conv",),
                "weights",
                AtMost(engine.depthwise_weights),
                "weights of a depthwise convolution take up to {allowed} bytes, channels rounded "
                f"up to {engine.depthwise_weight_channels}",
                "use fewer channels, or a smaller kernel",
                when=("depthwise",),
            )
        )
    return tuple(rules)


def pool_rules(engine: Engine) -> tuple[Rule, ...]:
    """Return the limits of pools."""
    both = ("max_pool", "avg_pool")
    return (
        Rule(
            "pool_kernel",
            ("max_pool",),
            "kernel",
            Between(1, engine.line_kernel),
            "a maximum pool is {allowed} high and wide, or as high or as wide as its input",
            "use several pools",
            unless=("spans",),
        ),
        Rule(
            "pool_padding",
            ("max_pool",),
            "padding",
            Between(0, engine.padding),
            "a maximum pool has {allowed} places around its input",
            "pad less",
            unless=("spans",),
        ),
        Rule(
            "pool_stride",
            both,
            "stride_beyond_kernel",
            AtMost(0),
            "the stride of a pool is no longer than its kernel",
            "use a kernel as long as the stride",
        ),
        Rule(
            "pool_dilation",
            ("max_pool",),
            "dilation",
            OneOf((1,)),
            "the dilation of a pool is {allowed}, others are ignored",
            "use dilation=1",
            evidence="sources",
        ),
        Rule(
            "ceil_mode",
            both,
            "op",
            Never(),
            "ceil_mode=True changes nothing; the engine ignores it",
            "use ceil_mode=False, and pad where it adds a window",
            when=("ceil",),
            evidence="engine",
        ),
        Rule(
            "count_include_pad",
            ("avg_pool",),
            "padding",
            Never(),
            "an average pool counts the zeros around its input",
            "use count_include_pad=True",
            when=("skips_padding",),
            evidence="engine",
        ),
        Rule(
            "divisor",
            ("avg_pool",),
            "op",
            Never(),
            "an average pool divides by the size of its window",
            "leave `divisor_override` away",
            when=("other_divisor",),
            evidence="engine",
        ),
    )
