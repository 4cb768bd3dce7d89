"""Layers that PyTorch lacks, and conversion of their checkpoints."""

from lightning_linger.nn.conversion import (
    LAYOUTS,
    asr_to_lstmp,
    convert,
    fast_to_ublstmp,
    find_layers,
    join_bidirectional,
    lstmp_to_asr,
    lstmp_to_torch,
    split_bidirectional,
    torch_to_lstmp,
    ublstmp_to_fast,
)
from lightning_linger.nn.fake_quantize import FakeQuantize, fake_quantize_defaults
from lightning_linger.nn.lstmp import LSTMP
from lightning_linger.nn.ublstmp import UBLSTMP

__all__ = [
    "LAYOUTS",
    "LSTMP",
    "UBLSTMP",
    "FakeQuantize",
    "asr_to_lstmp",
    "convert",
    "fake_quantize_defaults",
    "fast_to_ublstmp",
    "find_layers",
    "join_bidirectional",
    "lstmp_to_asr",
    "lstmp_to_torch",
    "split_bidirectional",
    "torch_to_lstmp",
    "ublstmp_to_fast",
]
