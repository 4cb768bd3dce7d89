"""Attention, as a function and as layers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Lambda
from tests.ops.cases.case import Case, Inputs

KIND, LAYER = "scaled_dot_product_attention", "multi_head_attention_forward"
EIGHT_BITS = {"linger/16": "takes and gives 8 bits"}
COMPUTED = {"linger": "the engine has no selection"}
SHAPE = (2, 5, 12)


def on_linears(function: Callable[..., Any], operands: int) -> Any:
    """A function of linear layers; scores that need a step above 1/2 no engine's softmax takes."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(operands))

        def forward(self: Any, x: Tensor) -> Any:
            return function(*(layer(x) for layer in self.layers))

        return Lambda(forward, layers=layers), (values(rng),)

    return build


def values(rng: random.Random) -> Tensor:
    return torch.randn(SHAPE) * 2.0 ** rng.randint(-3, 1)


def attend(**fields: Any) -> Callable[..., Tensor]:
    """Attention of two heads of width 6 among results of linear layers."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [x.view(2, 5, 2, 6).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*parts, **fields)

    return run


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(2, 5, 4, 3).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def with_mask(mask: Tensor, learned: bool = False) -> Any:
    """Attention with a mask that the model holds."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

        def forward(self: Any, x: Tensor) -> Tensor:
            return attend(attn_mask=self.mask)(*(layer(x) for layer in self.layers))

        model = Lambda(forward, layers=layers)
        if learned:
            model.mask = nn.Parameter(mask.clone())
        else:
            model.register_buffer("mask", mask)
        return model, (values(rng),)

    return build


def multi_head(
    function: Callable[..., Any], inputs: int = 1, **fields: Any
) -> Callable[[random.Random], tuple[nn.Module, Inputs]]:
    """``nn.MultiheadAttention`` behind a linear layer."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        attention = nn.MultiheadAttention(12, 3, batch_first=True, dropout=0.2, **fields)

        def forward(self: Any, x: Tensor, *others: Tensor) -> Any:
            return function(self.attention, self.linear(x), *others)

        model = Lambda(forward, linear=nn.Linear(12, 12), attention=attention)
        others = tuple(torch.randn(2, 7, size) for size in (8, 10)[: inputs - 1])
        return model, (values(rng), *others)

    return build


def encoder(**fields: Any) -> Callable[[random.Random], tuple[nn.Module, Inputs]]:
    """A transformer encoder, padded and causal, whose fast path must not be taken."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, **fields)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return model, (values(rng),)

    return build


def padded(rng: random.Random) -> tuple[nn.Module, Inputs]:
    model = Lambda(
        lambda self, x, mask: self.attention(x, x, x, key_padding_mask=mask),
        attention=nn.MultiheadAttention(12, 2, batch_first=True),
    )
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return model, (values(rng), mask)


def causal(attention: nn.Module, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


ALLOWED = torch.ones(5, 5, dtype=torch.bool).tril()
BIAS = torch.linspace(-3.0, 1.0, 25).view(5, 5)
SELF = {"refused": EIGHT_BITS, "gradient": "finite"}

CASES = [
    Case(KIND, "plain", on_linears(attend(), 3), **SELF),
    Case(KIND, "causal", on_linears(attend(is_causal=True), 3), **SELF),
    Case(KIND, "scale", on_linears(attend(scale=0.3), 3), **SELF),
    Case(KIND, "exact_scale", on_linears(attend(scale=0.5), 3), **SELF),
    Case(KIND, "grouped", on_linears(grouped, 3), **SELF),
    Case(
        KIND,
        "flat",
        on_linears(lambda q, k: F.scaled_dot_product_attention(q, k, k), 2),
        **SELF,
    ),
    Case(KIND, "boolean", with_mask(ALLOWED), **SELF),
    Case(KIND, "bias", with_mask(BIAS, learned=True), **SELF),
    Case(KIND, "bias_and_infinity", with_mask(BIAS.masked_fill(~ALLOWED, -math.inf)), **SELF),
    Case(LAYER, "self", multi_head(lambda m, x: m(x, x, x)), **SELF),
    Case(LAYER, "no_bias", multi_head(lambda m, x: m(x, x, x), bias=False), **SELF),
    Case(LAYER, "causal", multi_head(causal), **SELF),
    Case(
        LAYER,
        "heads",
        multi_head(lambda m, x: m(x, x, x, average_attn_weights=False)),
        **SELF,
    ),
    Case(LAYER, "cross", multi_head(lambda m, x, k, v: m(x, k, v), 3, kdim=8, vdim=10), **SELF),
    Case(LAYER, "unbatched", multi_head(lambda m, x: m(x[0], x[0], x[0])), **SELF),
    Case(LAYER, "padded", padded, gradient="finite", refused=COMPUTED),
    Case(
        LAYER,
        "encoder",
        encoder(),
        covers=("layer_norm", "add", "relu"),
        refused={**EIGHT_BITS, "venus": "no form of layer_norm", "venus/16": "8 bits"},
        gradient="finite",
    ),
    Case(
        LAYER,
        "encoder_norm_first",
        encoder(norm_first=True, activation="gelu"),
        covers=("gelu",),
        refused={
            "linger/16": "no form of layer_norm",
            "venus": "no form of layer_norm",
            "arcs": "no form of gelu",
        },
        gradient="finite",
    ),
]
