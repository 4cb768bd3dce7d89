"""Quantization-aware training as PyTorch Lightning callbacks.

What you train is, bit for bit, what the chip runs.
"""

from lightning_linger.__about__ import __version__
from lightning_linger.analysis.bits import choose_bits
from lightning_linger.analysis.check import check
from lightning_linger.analysis.dumps import Dumper, compare_references, diff_dumps, read_dump
from lightning_linger.analysis.resources import resources
from lightning_linger.analysis.sensitivity import sensitivity
from lightning_linger.analysis.statistics import analyse_activations, analyse_weights
from lightning_linger.core.config import FuseConfig, Limit, NormalizeConfig, QuantConfig
from lightning_linger.core.errors import (
    ConfigError,
    LingerError,
    NonFiniteError,
    NotReadyError,
    QuantizationWarning,
    UnsupportedError,
)
from lightning_linger.core.functions import operator
from lightning_linger.core.images import FirstConv
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.verification import verify
from lightning_linger.nn import LSTMP, UBLSTMP
from lightning_linger.ops.recurrent import fused_rnn
from lightning_linger.presets import preset
from lightning_linger.simulate.divergence import divergence, quant_error
from lightning_linger.simulate.integer import integer
from lightning_linger.stages.adaround import AdaRoundConfig, adaround
from lightning_linger.stages.calibrate import calibrate
from lightning_linger.stages.checkpoints import load_checkpoint
from lightning_linger.stages.correct_bias import correct_bias
from lightning_linger.stages.equalize import equalize
from lightning_linger.stages.firstconv import take_raw_images
from lightning_linger.stages.freeze import freeze_ranges
from lightning_linger.stages.fuse_bn import fuse_bn
from lightning_linger.stages.learned import learned_ranges, parameter_groups
from lightning_linger.stages.mixin import LingerMixin
from lightning_linger.stages.normalize import normalize
from lightning_linger.stages.prepare import prepare, strip
from lightning_linger.stages.quantize import quantize
from lightning_linger.stages.reestimate_bn import reestimate_bn
from lightning_linger.stages.selection import (
    disable_normalize,
    disable_quant,
    normalize_module,
    quant_module,
)
from lightning_linger.stages.skipped import skipped_layers
from lightning_linger.stages.summary import summary
from lightning_linger.stages.widths import change_bits

__all__ = [
    "LSTMP",
    "UBLSTMP",
    "AdaRoundConfig",
    "ConfigError",
    "Dumper",
    "FirstConv",
    "FuseConfig",
    "Limit",
    "LingerError",
    "LingerMixin",
    "NonFiniteError",
    "NormalizeConfig",
    "NotReadyError",
    "OnnxIntegerRunner",
    "QuantConfig",
    "QuantizationWarning",
    "UnsupportedError",
    "__version__",
    "adaround",
    "analyse_activations",
    "analyse_weights",
    "calibrate",
    "change_bits",
    "check",
    "choose_bits",
    "compare_references",
    "correct_bias",
    "diff_dumps",
    "disable_normalize",
    "disable_quant",
    "divergence",
    "equalize",
    "export_onnx",
    "freeze_ranges",
    "fuse_bn",
    "fused_rnn",
    "integer",
    "learned_ranges",
    "load_checkpoint",
    "normalize",
    "normalize_module",
    "operator",
    "parameter_groups",
    "prepare",
    "preset",
    "quant_error",
    "quant_module",
    "quantize",
    "read_dump",
    "reestimate_bn",
    "resources",
    "sensitivity",
    "skipped_layers",
    "strip",
    "summary",
    "take_raw_images",
    "verify",
]
