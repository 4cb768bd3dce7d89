"""Conversion between the layouts in which checkpoints hold LSTMs with projection.

==================== =====================================================================
layout               what holds it
==================== =====================================================================
asr                  `LSTMP` of pytorch-asr-extension
lstmp                `lightning_linger.nn.LSTMP`
torch                ``nn.LSTM(..., proj_size=...)``, which linger calls FastLSTMP
asr-ublstmp          `UBLSTMP` of pytorch-asr-extension
ublstmp              `lightning_linger.nn.UBLSTMP`
fast-ublstmp         two ``nn.LSTM`` as submodules ``forward_lstmp`` and ``backward_lstmp``
lstmp-pair           two `LSTMP` next to each other, the second named like the first with a 2
torch-bidirectional  ``nn.LSTM(..., proj_size=..., bidirectional=True)``
==================== =====================================================================

The first three hold one direction, the others two. Names, shapes and gate orders are those of
section 4 of linger's manual, and for ``asr-ublstmp`` of pytorch-asr-extension itself.

A converter takes a state dict and returns a new one. Only the tensors of the layer change; tensors
whose values stay the same share memory with the input, as those of a state dict do with the model.
"""

from lightning_linger.nn.conversion.bidirectional import join_bidirectional, split_bidirectional
from lightning_linger.nn.conversion.converters import (
    asr_to_lstmp,
    convert,
    fast_to_ublstmp,
    lstmp_to_asr,
    lstmp_to_torch,
    torch_to_lstmp,
    ublstmp_to_fast,
)
from lightning_linger.nn.conversion.layouts import LAYOUTS, check_layout, find_layers

__all__ = [
    "LAYOUTS",
    "asr_to_lstmp",
    "check_layout",
    "convert",
    "fast_to_ublstmp",
    "find_layers",
    "join_bidirectional",
    "lstmp_to_asr",
    "lstmp_to_torch",
    "split_bidirectional",
    "torch_to_lstmp",
    "ublstmp_to_fast",
]
