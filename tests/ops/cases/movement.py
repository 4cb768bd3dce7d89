"""Ops that move values, drop some, or fill in constants."""

import torch
from torch.nn import functional as F

from tests.ops.cases import Case, on_convs, on_linears

SEQUENCE = (3, 7, 6)
WIDE = (2, 8, 6, 6)
_COMPUTED_SHAPE = dict.fromkeys(("linger", "qdq"), "the size of its result depends on values")


def moved(kind, name, function, shape=(3, 4, 8, 8), **fields):
    """A movement between two ops, so that its result has to be on the grid still."""
    build = on_convs if len(shape) == 4 else on_linears
    return Case(kind, name, build(lambda a: function(a).relu(), shape=shape), **fields)


def _first(a, dim):
    index = torch.zeros_like(a[:, :1], dtype=torch.long)
    return a.gather(dim, index)


CASES = [
    Case("flatten", "all", on_convs(lambda a: a.flatten(1))),
    moved("flatten", "ravel", lambda a: a.ravel()),
    Case("unflatten", "channels", on_convs(lambda a: a.unflatten(1, (2, 2)))),
    Case("reshape", "batch", on_convs(lambda a: a.reshape(3, -1))),
    Case("view", "pairs", on_convs(lambda a: a.view(3, 4, 64).mean(2))),
    Case("permute", "last", on_convs(lambda a: a.permute(0, 2, 3, 1))),
    moved("permute", "heads", lambda a: a.view(3, 7, 2, 3).permute(0, 2, 1, 3), SEQUENCE),
    moved("permute", "reversed", lambda a: a.permute(0, 3, 2, 1)),
    moved("permute", "batch", lambda a: a.permute(1, 0, 2, 3)),
    moved("permute", "all", lambda a: a.permute(3, 1, 0, 2)),
    moved("permute", "six", lambda a: a.view(3, 2, 2, 4, 2, 8).permute(0, 4, 2, 5, 1, 3)),
    Case("transpose", "last-two", on_convs(lambda a: a.transpose(2, 3))),
    moved("transpose", "time", lambda a: a.transpose(0, 1), SEQUENCE),
    moved("transpose", "property", lambda a: a.mT, SEQUENCE),
    moved("transpose", "matrix", lambda a: a.t(), (5, 6)),
    moved("transpose", "movedim", lambda a: a.movedim(1, -1)),
    Case("squeeze", "one", on_convs(lambda a: a.unsqueeze(1).squeeze(1)), covers=("unsqueeze",)),
    moved("unsqueeze", "atleast", lambda a: torch.atleast_3d(a), (5, 6)),
    Case("slice", "range", on_convs(lambda a: a[:, 1:, 2:-1])),
    Case("slice", "index", on_convs(lambda a: a[:, -1])),
    moved("slice", "strided", lambda a: a[:, ::2, 1::3]),
    moved("slice", "narrow", lambda a: a.narrow(2, 1, 3)),
    moved("slice", "listed", lambda a: a[:, [2, 0, 1, 1]]),
    moved("slice", "index_select", lambda a: a.index_select(3, torch.tensor([7, 0, 3, 4, 5]))),
    moved("slice", "new-axis", lambda a: a[:, None, ..., :2]),
    Case("chunk", "swap", on_convs(lambda a: torch.cat(a.chunk(2, 1)[::-1], 1) + a)),
    moved("chunk", "hsplit", lambda a: torch.hsplit(a, 2)[1]),
    moved("chunk", "tensor_split", lambda a: a.tensor_split(3, 3)[0]),
    Case("split", "uneven", on_convs(lambda a: [part * 2 for part in a.split([1, 3], 1)])),
    moved("split", "unbind", lambda a: a.unbind(1)[2]),
    Case("contiguous", "clone", on_convs(lambda a: a.transpose(2, 3).contiguous().clone())),
    moved("expand", "channel", lambda a: a[:, :1].expand(-1, 5, -1, -1)),
    moved("expand", "new-dim", lambda a: a.expand(2, 7, 5, 6), (5, 6)),
    moved("expand", "like", lambda a: a[:, :1].expand_as(a)),
    moved("expand", "broadcast_to", lambda a: a[:, :1, :1].broadcast_to(a.shape)),
    moved("repeat", "two", lambda a: a.repeat(1, 3, 2, 1)),
    moved("repeat", "tile", lambda a: a.tile(2), (5, 6)),
    moved("repeat_interleave", "channels", lambda a: a.repeat_interleave(3, 1)),
    moved("roll", "window", lambda a: a.roll((-2, 3), (2, 3))),
    moved("roll", "flat", lambda a: a.roll(2), (5, 6)),
    moved("flip", "channels", lambda a: a.flip(1)),
    moved("flip", "both", lambda a: a.flip((2, 3))),
    moved("flip", "left-right", lambda a: torch.fliplr(a), (5, 6)),
    moved("rot90", "image", lambda a: a.rot90(1, (2, 3))),
    moved("rot90", "back", lambda a: torch.rot90(a, -1, (3, 2))),
    moved("gather", "first", lambda a: _first(a, 1)),
    moved(
        "gather",
        "take_along_dim",
        lambda a: torch.take_along_dim(a, torch.tensor([[[[0]], [[3]]]]), 1),
    ),
    moved("masked_select", "positive", lambda a: a.masked_select(a > 0), refused=_COMPUTED_SHAPE),
    moved("diagonal", "image", lambda a: a.diagonal(1, 2, 3)),
    moved("diagonal", "sequence", lambda a: a.diagonal(-1, 2, 0), SEQUENCE),
    moved("tril", "image", lambda a: a.tril()),
    moved("triu", "sequence", lambda a: a.triu(1), SEQUENCE),
    moved("pixel_shuffle", "two", lambda a: F.pixel_shuffle(a, 2), WIDE),
    moved("pixel_unshuffle", "two", lambda a: F.pixel_unshuffle(a, 2), WIDE),
    moved("channel_shuffle", "two", lambda a: F.channel_shuffle(a, 2), WIDE),
    moved("channel_shuffle", "four", lambda a: F.channel_shuffle(a, 4), WIDE),
    moved("unfold", "windows", lambda a: a.unfold(2, 3, 2)),
    moved("unfold", "overlapping", lambda a: a.unfold(1, 4, 1), SEQUENCE),
    moved("unfold", "patches", lambda a: F.unfold(a, 2, stride=2)),
    moved("unfold", "dilated", lambda a: F.unfold(a, (3, 2), (2, 1), (1, 2), (2, 3))),
    moved("cast", "double", lambda a: a.double().float()),
    moved("cast", "same", lambda a: a.to(torch.float32).type_as(a).to("cpu")),
    Case("pad", "zeros", on_convs(lambda a: F.pad(a, (1, 2, 0, 1)))),
    Case("pad", "value", on_convs(lambda a: F.pad(a, (1, 2), value=0.3))),
    Case("pad", "far", on_convs(lambda a: F.pad(a, (1, 1), value=-1e9))),
    Case("pad", "crop", on_convs(lambda a: F.pad(a, (-1, 2, 3, -2)))),
    Case("pad", "reflect", on_convs(lambda a: F.pad(a, (1, 2, 1, 1), mode="reflect"))),
    Case("pad", "replicate", on_convs(lambda a: F.pad(a, (0, 2, 3, 1), mode="replicate"))),
    Case("pad", "circular", on_convs(lambda a: F.pad(a, (2, 1, 1, 0), mode="circular"))),
    Case("dropout", "off", on_convs(lambda a: F.dropout(a, 0.5, training=False) * 2)),
]
