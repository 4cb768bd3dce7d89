"""How the older generation of the ``linger`` dialect spells the newer one's ops, as data.

``linger3`` is the generation that the library writes by default; ``linger1`` is the older one. The
engine's packer reads both. Attributes that are not named here are spelled alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Domains of the two generations; readers ignore them.
LINGER3_DOMAIN = "linger"
LINGER1_DOMAIN = "thinker"

# What a node says about the chip it is for. Nodes of the older generation name a chip only where it
# is not the first one, whose rounding attribute is required of all.
PLATFORM = "platform"
FIRST_PLATFORM = "venus"
CHIP_ATTRIBUTES = (PLATFORM, "quant_mode")
ROUNDING = {"platform_quant": "luna_quant"}


@dataclass(frozen=True)
class Spelling:
    """One op of the newer generation in the older one.

    Args:
        op_type: Its name there.
        renamed: Attributes that have another name, from the newer to the older one.
        implied: Attributes that it lacks, and the values that it may stand for, the usual first. A
            star in a name is a number.
        ignored: Attributes that older exporters add, and no reader looks at.
    """

    op_type: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)


_BITS = {"x_bits": "data_bits"}
_LAYER = {**_BITS, "w_bits": "parameter_bits"}
# Codes of fewer bits lie in whole bytes, and a node of its own clamps them.
_BYTE = (8, 7, 6, 5, 4, 3, 2)
_RESULT = {"o_bits": _BYTE}
_PAIR = {"x_bits": _BYTE, "y_bits": _BYTE, **_RESULT}
# The element type of the operand tells its width.
_CURVE = {"x_bits": (*_BYTE, 16), **_RESULT}
_CASTOR = {"castor_mode": "STRING"}

# By the newer generation's name.
LINGER1: dict[str, Spelling] = {
    "Quant": Spelling("Quant", implied={"zero_point": (0,)}),
    "Dequant": Spelling("Dequant"),
    "Requant": Spelling("Requant"),
    "QConv1d": Spelling("Conv1dInt", _LAYER),
    "QConv2d": Spelling("Conv2dInt", _LAYER, ignored=_CASTOR),
    "QConvTranspose2d": Spelling("ConvTranspose2dInt", _LAYER),
    "QLinear": Spelling("LinearInt", _LAYER),
    "QBatchNorm2d": Spelling("BatchNorm2dInt", _LAYER),
    "QLayerNorm2d": Spelling("LayerNormInt", _LAYER, {"axis": (-1,), "epsilon": (1e-5,)}),
    "QAdd": Spelling("iqAdd", implied=_PAIR, ignored={"mode": "STRING"}),
    "QSub": Spelling("iqSub", implied=_PAIR),
    "QMul": Spelling("iqMul", implied=_PAIR),
    "iqDiv": Spelling("iqDiv", implied=_PAIR),
    "QCat": Spelling("iqCat", {"axis": "dim"}, {**_RESULT, "x_*_bits": _BYTE}),
    "QBmm": Spelling("BmmInt", _BITS, {"y_bits": _BYTE}),
    "QSigmoid": Spelling("iqSigmoid", implied=_CURVE, ignored=_CASTOR),
    "QTanh": Spelling("iqTanh", implied=_CURVE, ignored=_CASTOR),
    "QSoftmax": Spelling("SoftmaxInt", _BITS),
    "LogSoftmaxInt": Spelling("LogSoftmaxInt", _BITS),
    "QAvgPool2d": Spelling(
        "AvgPool2dInt", _BITS, {"count_include_pad": (1,), "divisor_override": (-1,)}
    ),
    "MaxPool": Spelling("MaxPool"),
    "Gather": Spelling("Gather", {"w_bits": "parameter_bits"}, {"axis": (0,)}),
    "QLSTM": Spelling(
        "LSTMInt",
        {**_LAYER, "scale_x": "scale_i"},
        {"scale_c": (2.0**15,), "has_hidden": (0,), "has_cell": (0,)},
        {"dropout": "FLOAT"},
    ),
}

# Ops of the older generation that are read and not written (docs/export.md says why).
ONLY_READ = ("iqSum", "iqVar", "iqMax", "iqClamp", "iqPad", "GRUInt")
# Older releases tell recurrent layers apart by the types of their operands.
TYPED_NAMES = (
    *("LSTMInt_Is8_Is64", "LSTMInt_Is8_Is64_If32_If32"),
    *("GRUInt_Is8_Is64", "GRUInt_Is8_Is64_If32"),
)

# Further names that the packer reads.
ALIASES: dict[str, str] = {
    **{spelling.op_type: op_type for op_type, spelling in LINGER1.items()},
    **{f"QConvBN{d}d": f"QConv{d}d" for d in (1, 2)},
    "ConvTranspose1dInt": "QConvTranspose1d",
    "BatchNorm1dInt": "QBatchNorm1d",
    "AvgPool1dInt": "QAvgPool1d",
    "GluInt": "QGLU",
    "QLayerNorm": "QLayerNorm2d",
    **dict.fromkeys(TYPED_NAMES[:2], "QLSTM"),
    **dict.fromkeys(("GRUInt", *TYPED_NAMES[2:]), "QGRU"),
}
ATTRIBUTE_ALIASES: dict[str, str] = {
    "data_bits": "x_bits",
    "parameter_bits": "w_bits",
    "stride": "strides",
    "scale_i": "scale_x",
    "dim": "axis",
    "keepdim": "keepdims",
}
