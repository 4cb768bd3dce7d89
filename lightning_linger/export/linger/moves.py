"""What the engine moves right: runs, blocks, and a few transposes; and what is made of them.

Measured on the engine: slices of one axis with step 1, joins of codes of one scale, reshapes, and
the transposes of :data:`_LEGAL`. A choice of places along an axis is a join of slices; where places
are repeated, or lie at even distances, a reshape makes one slice of many.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.linger.attributes import bits_of
from lightning_linger.export.linger.elementwise import MAX_CAT_OPERANDS
from lightning_linger.export.linger.schema import DOMAIN

Perm = tuple[int, ...]
# A block of axes [i, j) changes places with the block [j, k) behind it.
Swap = tuple[int, int, int]

_COMMON = ("platform", "quant_mode", "platform_quant")
# Which result of an LSTM is its cell state, at a scale of its own.
_CELL = 2

_LEGAL: frozenset[Perm] = frozenset(
    [
        *[(1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)],
        *[(0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2), (1, 0, 2, 3)],
    ]
)
# At these the executor of venusA breaks off.
_LEGAL_ELSEWHERE: frozenset[Perm] = _LEGAL | {(0, 2, 1, 3), (0, 3, 2, 1)}


class Mover:
    """Adds moves in the place of one node.

    Args:
        graph: The graph.
        node: What is replaced.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node
        self._count = itertools.count()

    # --- what the engine has ----------------------------------------------------------------

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape; of several reshapes one behind the other the last is enough."""
        before = x.producer()
        while before is not None and before.op_type == "Reshape" and before.inputs[0] is not None:
            x = before.inputs[0]
            before = x.producer()
        if shape_of(x) == list(shape):
            return x
        return self._node("Reshape", [x, self.numbers(shape)], {}, shape, x)

    def copy(self, x: ir.Value) -> ir.Value:
        """Give a value a second name."""
        shape = shape_of(x)
        return self._node("Reshape", [x, self.numbers(shape)], {}, shape, x)

    def slice(self, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        """Cut one run out of an axis."""
        shape = shape_of(x)
        if (start, stop) == (0, shape[axis]):
            return x
        shape[axis] = stop - start
        bounds = [self.numbers([number]) for number in (start, stop, axis)]
        return self._node("Slice", [x, *bounds], {}, shape, x)

    def cat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """Join codes of one scale."""
        if len(parts) == 1:
            return parts[0]
        if len(parts) > MAX_CAT_OPERANDS:
            halves = [parts[: len(parts) // 2], parts[len(parts) // 2 :]]
            return self.cat([self.cat(half, axis) for half in halves], axis)
        shape = shape_of(parts[0])
        shape[axis] = sum(shape_of(part)[axis] for part in parts)
        attributes, scale = self._grid(parts[0])
        bits = bits_of(parts[0])
        for index in range(len(parts)):
            attributes |= {f"scale_x_{index}": scale, f"x_{index}_bits": bits}
        attributes |= {"axis": axis, "o_bits": bits, "scale_o": scale}
        return self._node("QCat", parts, attributes, shape, parts[0], DOMAIN)

    def turn(self, x: ir.Value, perm: Perm) -> ir.Value:
        """Transpose in one of the ways that the engine has."""
        shape = shape_of(x)
        return self._node("Transpose", [x], {"perm": list(perm)}, [shape[d] for d in perm], x)

    # --- what is made of it -----------------------------------------------------------------

    def transpose(self, x: ir.Value, perm: Perm) -> ir.Value:
        """Transpose in any way, as a chain of those that the engine has."""
        legal = _LEGAL if self._engine() == "venusA" else _LEGAL_ELSEWHERE
        shape = shape_of(x)
        target = [shape[d] for d in perm]
        sizes, order = merged_axes(shape, perm)
        if perm in legal and len(order) > 1:
            return self.turn(x, perm)
        for i, j, k in swaps(order, (0, 2, 1, 3) in legal):
            blocks = [sizes[:i], sizes[i:j], sizes[j:k], sizes[k:]]
            x = self._swap(x, [math.prod(block) for block in blocks], legal)
            sizes = [*blocks[0], *blocks[2], *blocks[1], *blocks[3]]
        return self.reshape(x, target)

    def _swap(self, x: ir.Value, sizes: list[int], legal: frozenset[Perm]) -> ir.Value:
        front, a, b, behind = sizes
        if front == 1 and behind == 1:
            return self.turn(self.reshape(x, [a, b]), (1, 0))
        if front == 1:
            return self.turn(self.reshape(x, [a, b, behind]), (1, 0, 2))
        if behind == 1:
            return self.turn(self.reshape(x, [front, a, b]), (0, 2, 1))
        x = self.reshape(x, sizes)
        if (0, 2, 1, 3) in legal:
            return self.turn(x, (0, 2, 1, 3))
        return self.turn(self.turn(x, (0, 2, 3, 1)), (0, 1, 3, 2))

    def tile(self, x: ir.Value, axis: int, times: int) -> ir.Value:
        """Repeat the whole of an axis."""
        if times <= MAX_CAT_OPERANDS:
            return self.cat([x] * times, axis)
        block = self.cat([x] * MAX_CAT_OPERANDS, axis)
        whole, rest = divmod(times, MAX_CAT_OPERANDS)
        return self.cat([self.tile(block, axis, whole), *[x] * rest], axis)

    def take(self, x: ir.Value, axis: int, places: Sequence[int]) -> ir.Value:
        """Choose places along an axis."""
        shape = shape_of(x)
        target = [*shape[:axis], len(places), *shape[axis + 1 :]]
        outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        runs = runs_of(places)
        if len(runs) == 1:
            return self.slice(x, axis, *runs[0])
        times = repeats_of(places)
        if times > 1:
            x = self.take(x, axis, places[::times])
            x = self.reshape(x, [outer * shape_of(x)[axis], 1, inner])
            return self.reshape(self.tile(x, 1, times), target)
        period = period_of(places)
        if period < len(places):
            x = self.take(x, axis, places[:period])
            return self.tile(x, axis, len(places) // period)
        step = places[1] - places[0]
        if step > 1 and list(places) == list(range(places[0], places[-1] + 1, step)):
            return self._take_evenly(x, axis, places, step, (outer, inner))
        if len(runs) > MAX_CAT_OPERANDS:
            refuse(
                self.node,
                f"a choice of {len(places)} values in {len(runs)} pieces",
                "the engine moves runs of values",
                f"Keep to {MAX_CAT_OPERANDS} pieces",
            )
        return self.cat([self.slice(x, axis, *run) for run in runs], axis)

    def _take_evenly(
        self, x: ir.Value, axis: int, places: Sequence[int], step: int, around: tuple[int, int]
    ) -> ir.Value:
        """Cut the axis into rows as long as the distance, and one column out of them."""
        size, count = shape_of(x)[axis], len(places)
        start = min(places[0], size - step * count)
        if start < 0 or places[0] - start >= step:  # the last row is not complete
            front = self.take(x, axis, places[:-1])
            return self.cat([front, self.slice(x, axis, places[-1], places[-1] + 1)], axis)
        target = shape_of(x)
        target[axis] = count
        rows = self.slice(x, axis, start, start + step * count)
        rows = self.reshape(rows, [around[0] * count, step, around[1]])
        return self.reshape(self.slice(rows, 1, places[0] - start, places[0] - start + 1), target)

    # --- nodes ------------------------------------------------------------------------------

    def numbers(self, numbers: Sequence[int]) -> ir.Value:
        """Add whole numbers as an initializer."""
        name = f"{self.node.name}/numbers{next(self._count)}"
        tensor = ir.Tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape([len(numbers)]),
            const_value=tensor,
        )
        self.graph.initializers[name] = value
        return value

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any],
        shape: Sequence[int],
        like: ir.Value,
        domain: str = "",
    ) -> ir.Value:
        name = f"{self.node.name}/{op_type.lower()}{next(self._count)}"
        converted = ir.convenience.convert_attributes(attributes)
        new = ir.Node(domain, op_type, inputs, converted, name=name, num_outputs=1)
        (output,) = new.outputs
        output.name, output.type, output.shape = name, like.type, ir.Shape(list(shape))
        self.graph.insert_before(self.node, new)
        return output

    def _grid(self, x: ir.Value) -> tuple[dict[str, Any], float]:
        """Return the attributes that all ops carry, and the scale of codes."""
        made = _made_by_the_engine(x)
        node = None if made is None else made.producer()
        if made is not None and node is not None:
            named = {name: a.value for name, a in node.attributes.items()}
            scale = named.get("scale_o", named.get("scale_x"))
            if node.op_type == "QLSTM" and made.index() == _CELL:
                scale = named["scale_c"]
            if scale is not None and "platform" in named:
                return {n: named[n] for n in _COMMON if n in named}, float(scale)
        return refuse(
            self.node, "a join of codes whose scale is not known", "a join has one", "Use a layer"
        )

    def _engine(self) -> str:
        named = (node.attributes.get("platform") for node in self.graph)
        return next((attribute.as_string() for attribute in named if attribute is not None), "")


def _made_by_the_engine(x: ir.Value | None) -> ir.Value | None:
    """Return codes as an op of the engine made them, wherever they were moved since."""
    while x is not None:
        node = x.producer()
        if node is None or node.domain == DOMAIN:
            return None if node is None else x
        x = node.inputs[0] if node.inputs else None
    return None


def refuse(node: ir.Node, what: str, why: str, remedy: str) -> NoReturn:
    """Refuse a movement that cannot be written.

    Args:
        node: The movement.
        what: What it is.
        why: The reason.
        remedy: What to do, as a sentence without its end.
    """
    made = _made_by_the_engine(node.inputs[0])
    origin = None if made is None else made.producer()
    site = "an input" if origin is None else f"`{origin.name}`"
    msg = (
        f"behind {site}: the linger dialect has no form of {what} because {why}. {remedy}, or "
        "leave what is moved in float."
    )
    raise UnsupportedError(msg)


# --- permutations and places ------------------------------------------------------------------


def merged_axes(shape: Sequence[int], perm: Perm) -> tuple[list[int], Perm]:
    """Leave out axes of size 1 and join those that stay side by side.

    Returns:
        The sizes of what is left, and its permutation.
    """
    kept = [d for d in perm if shape[d] != 1]
    real = [d for d in range(len(shape)) if shape[d] != 1]
    groups: list[list[int]] = []
    for d in kept:
        follows = groups and real.index(d) == real.index(groups[-1][-1]) + 1
        if follows:
            groups[-1].append(d)
        else:
            groups.append([d])
    in_order = sorted(groups)
    sizes = [math.prod(shape[d] for d in group) for group in in_order]
    return sizes, tuple(in_order.index(group) for group in groups)


@functools.lru_cache(maxsize=256)
def swaps(perm: Perm, cheap: bool) -> tuple[Swap, ...]:
    """Return the fewest transposes, as exchanges of neighbouring blocks, that give a permutation.

    Args:
        perm: The permutation.
        cheap: Whether an exchange in the middle is one transpose; two otherwise.
    """
    rank = len(perm)
    start = tuple(range(rank))
    moves = [
        (i, j, k) for i in range(rank) for j in range(i + 1, rank) for k in range(j + 1, rank + 1)
    ]
    waiting: list[tuple[int, Perm, tuple[Swap, ...]]] = [(0, start, ())]
    seen: set[Perm] = set()
    while waiting:
        cost, order, path = heapq.heappop(waiting)
        if order == perm:
            return path
        if order in seen:
            continue
        seen.add(order)
        for i, j, k in moves:
            after = (*order[:i], *order[j:k], *order[i:j], *order[k:])
            price = 1 if cheap or i == 0 or k == rank else 2
            heapq.heappush(waiting, (cost + price, after, (*path, (i, j, k))))
    msg = f"internal: {perm} is no permutation."
    raise RuntimeError(msg)


def runs_of(places: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs ``[start, stop)`` of places that follow one another."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


def repeats_of(places: Sequence[int]) -> int:
    """Return how often each place stands behind itself, the same for all."""
    return math.gcd(*(len(list(alike)) for _, alike in itertools.groupby(places)))


def period_of(places: Sequence[int]) -> int:
    """Return the length of the part whose repetition is the whole."""
    count = len(places)
    for period in range(1, count):
        if count % period == 0 and list(places) == list(places[:period]) * (count // period):
            return period
    return count
