"""Recurrent layers: LSTM, GRU and RNN, their cells, and packed sequences."""

from lightning_linger.core.registry import register
from lightning_linger.ops.recurrent.call import LAYERS
from lightning_linger.ops.recurrent.fusion import fused_rnn
from lightning_linger.ops.recurrent.op import RecurrentOp
from lightning_linger.ops.recurrent.packing import PackOp, PadPackedOp, PadSequenceOp

for _kind in LAYERS:
    register(RecurrentOp(_kind))
    register(RecurrentOp(f"{_kind}_cell"))
register(PackOp("pack_padded_sequence"), "_pack_padded_sequence")
register(PadSequenceOp("pad_sequence"))
register(PadPackedOp("pad_packed_sequence"), "_pad_packed_sequence")

__all__ = ["RecurrentOp", "fused_rnn"]
