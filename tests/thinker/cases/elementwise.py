"""Sums, products, activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.thinker.cases.case import PackCase, everywhere, image, on_conv

ELEMENTWISE = [
    PackCase("add", "`x + y`", on_conv(lambda m, x: m.conv(x) + m.other(x)), image(), ("iqadd_",)),
    PackCase(
        "add_other_scales",
        "of different scales, with a ReLU",
        on_conv(lambda m, x: F.relu(m.conv(x) + 4 * m.other(x))),
        image(),
        ("iqadd_4_6_4", "relu"),
    ),
    PackCase("add_number", "`x + 0.3`", on_conv(lambda m, x: m.conv(x) + 0.3), image()),
    PackCase(
        "add_map",
        "`x + y` with broadcasting",
        on_conv(lambda m, x: m.conv(x) + m.other(x)[:, :1]),
        image(),
        refused=everywhere("export", "adds element by element", "one shape only"),
    ),
    PackCase(
        "sub",
        "`x - y`",
        on_conv(lambda m, x: m.conv(x) - m.other(x)),
        image(),
        refused=everywhere("packer", "set_input", "no subtraction"),
    ),
    PackCase("mul", "`x * y`", on_conv(lambda m, x: m.conv(x) * m.other(x)), image(), ("iqmul_",)),
    PackCase("mul_number", "`x * 0.3`", on_conv(lambda m, x: m.conv(x) * 0.3), image()),
    PackCase(
        "gate",
        "with one factor per channel",
        on_conv(lambda m, x: F.max_pool2d(m.conv(x), 6) * m.other(x)),
        image(),
        ("iqmul_bcast_c",),
    ),
    PackCase(
        "mul_map",
        "with one factor per place",
        on_conv(lambda m, x: m.conv(x) * m.other(x)[:, :1]),
        image(),
        refused=everywhere("export", "multiplies element by element", "one shape only"),
    ),
    PackCase(
        "cat",
        "`torch.cat`",
        on_conv(lambda m, x: torch.cat([m.conv(x), m.conv(x)], 1)),
        image(),
        ("iqcat_c__",),
    ),
    PackCase(
        "cat_other_scales",
        "of different scales",
        on_conv(lambda m, x: torch.cat([m.conv(x), 8 * m.other(x)], 1)),
        image(),
        ("iqcat_c_sc", "requant_"),
    ),
    PackCase(
        "relu6",
        "`F.relu6` and other clamps",
        on_conv(lambda m, x: F.relu6(8 * m.conv(x))),
        image(),
        refused=everywhere("packer", "Input must be int8, int16, or int32", "no Clip"),
    ),
]
