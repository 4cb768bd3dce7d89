"""Attention: one call of the model, several quantized steps inside.

==================  ==========================================================================
scores              ``q @ k^T * scale``, a mask added or filled in
probabilities       softmax, range 1
context             ``probabilities @ v``
==================  ==========================================================================

``scale`` costs no step of its own where the target multiplies when it rescales, or where it is a
power of two: it goes into the step of ``q``. Else ``q`` is multiplied by a constant of its own
width first; a projection in front of the scores takes it into its weight instead.

Masked places get the lowest code of the scores, which lies far enough below all others for a
probability of zero (see :mod:`lightning_linger.ops.select`). Where a whole row is masked the result
is the mean of the values.
"""

from lightning_linger.core.registry import register
from lightning_linger.ops.attention.multi_head import MultiHeadAttentionOp, MultiHeadCall
from lightning_linger.ops.attention.scaled_dot_product import AttentionCall, AttentionOp

register(AttentionOp("scaled_dot_product_attention"))
register(MultiHeadAttentionOp("multi_head_attention_forward"))

__all__ = ["AttentionCall", "AttentionOp", "MultiHeadAttentionOp", "MultiHeadCall"]
