"""Recurrent layers as models, and what tests ask of them."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from lightning_linger import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Lambda

KINDS = ("LSTM", "GRU", "RNN")
LAYERS = [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
LENGTHS = torch.tensor([5, 2, 7, 3])
each_kind = pytest.mark.parametrize("kind", KINDS)


def plain(kind, *sizes, **options):
    """A model that is one recurrent layer."""
    layer = getattr(nn, kind)(*sizes, **options)
    return Lambda(lambda self, *args: self.rnn(*args), rnn=layer)


def layer_site(model):
    (site,) = [
        s for s in instrumentation_of(model).sites if s.op.kind in ("lstm", "gru", "rnn_tanh")
    ]
    return site


def fixed(**fields):
    """A configuration in which every range is known beforehand."""
    return QuantConfig(range=1.0, **fields)


def equal(a, b):
    leaves = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in leaves if isinstance(x, torch.Tensor))


def packed_forward(self, x, lengths):
    y = self.first(x)
    sequences = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
    y, states = self.rnn(sequences)
    return pad_packed_sequence(y, batch_first=True)[0], states
