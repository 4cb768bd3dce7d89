"""Matrix products: linear layers, products of activations, attention."""

from __future__ import annotations

import math

from lightning_linger.analysis.layers import Data, Shape
from lightning_linger.analysis.walk import Reader, Visit
from lightning_linger.core.graph import TensorSpec
from lightning_linger.core.integer import is_power_of_two
from lightning_linger.ops.attention import AttentionCall, MultiHeadCall
from lightning_linger.ops.contraction import Contraction, contraction


def add_linear(
    visit: Visit, x: Data, out: Data, weight: Shape, has_bias: bool, rank: int | None = None
) -> None:
    """Add a linear layer with a weight ``[O, K]``."""
    rows = x.elements // weight[1]
    visit.add(
        "linear",
        (x,),
        (out,),
        channels=(weight[1], weight[0]),
        weights=(weight,),
        biases=weight[0] if has_bias else 0,
        weight_bits=visit.weight_bits,
        macs=rows * math.prod(weight),
        facts={"rank": len(x.shape) if rank is None else rank},
    )


def add_product(visit: Visit, x: Data, y: Data, out: Data) -> None:
    """Add a product of stacks of matrices."""
    features, columns = y.shape[-2:]
    stack = math.prod(out.shape[:-2])
    rows = math.prod(out.shape) // max(stack * columns, 1)
    visit.add(
        "matmul",
        (x, y),
        (out,),
        macs=stack * rows * features * columns,
        facts={"matrix": (features, columns)},
    )


def read_linear(visit: Visit) -> None:
    """Read ``F.linear``."""
    call, x = visit.call, visit.operand(0)
    has_bias = call.bias is not None or (visit.site is not None and visit.site.__dict__["fold"])
    add_linear(visit, x, visit.result(), tuple(call.weight.shape), bool(has_bias))


def read_addmm(visit: Visit) -> None:
    """Read ``addmm``: a linear layer whose weight stands the other way round."""
    weight: Shape = tuple(reversed(visit.call.mat2.shape))
    add_linear(visit, visit.operand(0), visit.result(), weight, True)


def read_product(visit: Visit) -> None:
    """Read ``matmul``, ``bmm`` or ``einsum``: with a weight of the model a linear layer."""
    call, site = visit.call, visit.site
    assert site is not None
    if site.op.parameters(call):
        (weight,) = site.op.parameters(call)
        x, out = visit.operand(0), visit.result()
        features = weight.shape[-1] if weight is call.input else weight.shape[0]
        if call.equation:
            found = contraction(call.equation, call.input.shape, call.other.shape)
            assert isinstance(found, Contraction)  # others have an obstacle
            sizes = dict(
                zip(found.x + found.y, (*call.input.shape, *call.other.shape), strict=True)
            )
            features = math.prod(sizes[index] for index in found.summed)
        outputs = math.prod(weight.shape) // features
        add_linear(visit, x, out, (outputs, features), False)
        return
    x, y = visit.operand(0), visit.operand(1)
    out = visit.result()
    if call.equation:
        found, sizes = _contraction(call.equation, x.shape, y.shape)
        batch, left, right, summed = (
            math.prod(sizes[index] for index in group)
            for group in (found.batch, found.left, found.right, found.summed)
        )
        x, y = x.reshaped((batch, left, summed)), y.reshaped((batch, summed, right))
        out = out.reshaped((batch, left, right))
    if len(y.shape) == 1:
        y = y.reshaped((*y.shape, 1))
    add_product(visit, x, y, out)


def _contraction(equation: str, x: Shape, y: Shape) -> tuple[Contraction, dict[str, int]]:
    """Return an einsum as one matrix product, and the sizes of its indices."""
    found = contraction(equation, x, y)
    assert isinstance(found, Contraction)  # others have an obstacle
    return found, dict(zip(found.x + found.y, (*x, *y), strict=True))


# --- attention ----------------------------------------------------------------------------------


def add_attention(
    visit: Visit, q: Data, k: Data, v: Data, out: Data, scale: float | None, mask: object
) -> None:
    """Add the steps of attention on ``[..., L, E]``, ``[..., S, E]`` and ``[..., S, E]``."""
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not is_power_of_two(factor):
        scaled = visit.inner(q.shape)
        visit.add("mul", (q,), (scaled,), facts={"number": True})
        q = scaled
    turned = visit.inner((*k.shape[:-2], k.shape[-1], k.shape[-2]))
    visit.add("transpose", (k,), (turned,), facts={"order": _swapped(len(k.shape))})
    scores = visit.inner((*q.shape[:-1], k.shape[-2]))
    add_product(visit, q, turned, scores)
    if mask is not None:
        kept = visit.inner(scores.shape)
        computed = isinstance(mask, TensorSpec) and visit.walk.is_computed(mask)
        visit.add("select", (scores,), (kept,), facts={"computed": computed})
        scores = kept
    weights = visit.inner(scores.shape)
    add_softmax(visit, scores, weights, len(scores.shape) - 1)
    add_product(visit, weights, v, out)


def add_softmax(visit: Visit, x: Data, out: Data, axis: int, kind: str = "softmax") -> None:
    """Add a softmax along an axis."""
    visit.add(kind, (x,), (out,), facts={"length": x.shape[axis]})


def read_attention(visit: Visit) -> None:
    """Read ``F.scaled_dot_product_attention``."""
    call: AttentionCall = visit.call
    q, k, v = (visit.operand(i) for i in range(3))
    mask = True if call.is_causal else call.attn_mask
    add_attention(visit, q, k, v, visit.result(), call.scale, mask)


def read_multi_head(visit: Visit) -> None:
    """Read ``F.multi_head_attention_forward``: ``[L, N, E]``."""
    call: MultiHeadCall = visit.call
    assert visit.site is not None
    sources = visit.site.op.operands(call)
    operands = {spec.value: visit.operand(i) for i, spec in enumerate(sources)}
    query, key, value = (operands[spec.value] for spec in (call.query, call.key, call.value))
    embedding, heads = call.embed_dim_to_check, call.num_heads
    has_bias = call.in_proj_bias is not None
    projected = []
    for x in (query, key, value):
        y = visit.inner((*x.shape[:-1], embedding))
        add_linear(visit, x, y, (embedding, x.shape[-1]), has_bias)
        projected.append(_split_heads(visit, y, heads))
    q, k, v = projected
    mask = call.attn_mask if call.key_padding_mask is None else call.key_padding_mask
    context = visit.inner((*q.shape[:-1], v.shape[-1]))
    add_attention(visit, q, k, v, context, None, mask)
    joined = visit.inner(query.shape)
    visit.add("transpose", (context,), (joined,), facts={"order": (1, 0, 2)})
    out = visit.result(0)
    add_linear(visit, joined, out, (embedding, embedding), call.out_proj_bias is not None)
    for index in range(1, len(visit.node.outputs)):
        visit.result(index, visit.activation_bits)


def _split_heads(visit: Visit, x: Data, heads: int) -> Data:
    """Turn ``[L, N, E]`` into ``[N * heads, L, E / heads]``."""
    rows, width = x.elements // x.shape[-1], x.shape[-1]
    batch = x.shape[1] if len(x.shape) == 3 else 1
    out = visit.inner((batch * heads, rows // batch, width // heads))
    visit.add("transpose", (x,), (out,), facts={"order": (1, 0, 2)})
    return out


def _swapped(rank: int) -> tuple[int, ...]:
    """Return the permutation that exchanges the last two axes, leading ones taken together."""
    return (1, 0) if rank == 2 else (0, 2, 1)


def read_softmax(visit: Visit) -> None:
    """Read ``softmax`` or ``log_softmax``."""
    x, axis = visit.operand(0), visit.call.dim
    kind, out = visit.node.op, visit.result()
    if math.prod(x.shape[axis + 1 :]) == 1 and axis == len(x.shape) - 1:
        add_softmax(visit, x, out, axis, kind)
        return
    # Another axis changes places with what lies behind it, and back.
    turned, inner = visit.inner(x.shape), visit.inner(x.shape, out.bits)
    visit.add("transpose", (x,), (turned,), facts={"order": (0, 2, 1)})
    add_softmax(visit, turned, inner, axis, kind)
    visit.add("transpose", (inner,), (out,), facts={"order": (0, 2, 1)})


READERS: dict[str, Reader] = {
    "linear": read_linear,
    "addmm": read_addmm,
    **dict.fromkeys(("matmul", "bmm", "einsum"), read_product),
    "scaled_dot_product_attention": read_attention,
    "multi_head_attention_forward": read_multi_head,
    **dict.fromkeys(("softmax", "log_softmax"), read_softmax),
}
