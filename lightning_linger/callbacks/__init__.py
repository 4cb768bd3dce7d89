"""The Lightning face of the library: thin callbacks, each a schedule over a stage."""

from lightning_linger.callbacks.adaround import AdaRoundCallback
from lightning_linger.callbacks.bias_correction import BiasCorrectionCallback
from lightning_linger.callbacks.calibrate import CalibrateCallback
from lightning_linger.callbacks.conditions import OnPlateau
from lightning_linger.callbacks.distillation import DistillationCallback
from lightning_linger.callbacks.dump import DumpCallback
from lightning_linger.callbacks.equalize import EqualizeCallback
from lightning_linger.callbacks.fuse_bn import FuseBNCallback
from lightning_linger.callbacks.hardware_check import HardwareCheckCallback
from lightning_linger.callbacks.integer_validator import IntegerValidatorCallback
from lightning_linger.callbacks.normalize import NormalizeCallback
from lightning_linger.callbacks.onnx_export import ONNXExportCallback
from lightning_linger.callbacks.progressive_bits import ProgressiveBitsCallback
from lightning_linger.callbacks.quant_error import QuantErrorCallback
from lightning_linger.callbacks.quantize import QuantizeCallback
from lightning_linger.callbacks.reestimate_bn import ReestimateBNCallback
from lightning_linger.callbacks.rng_state import RNGStateCallback
from lightning_linger.callbacks.sensitivity import SensitivityCallback
from lightning_linger.callbacks.stage_checkpoint import StageModelCheckpoint
from lightning_linger.callbacks.stage_switch import StageSwitchCallback

__all__ = [
    "AdaRoundCallback",
    "BiasCorrectionCallback",
    "CalibrateCallback",
    "DistillationCallback",
    "DumpCallback",
    "EqualizeCallback",
    "FuseBNCallback",
    "HardwareCheckCallback",
    "IntegerValidatorCallback",
    "NormalizeCallback",
    "ONNXExportCallback",
    "OnPlateau",
    "ProgressiveBitsCallback",
    "QuantErrorCallback",
    "QuantizeCallback",
    "RNGStateCallback",
    "ReestimateBNCallback",
    "SensitivityCallback",
    "StageModelCheckpoint",
    "StageSwitchCallback",
]
