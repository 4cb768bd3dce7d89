"""Recurrent layers: the engine runs one LSTM over one sequence."""

from __future__ import annotations

from lightning_linger.analysis.layers import Data
from lightning_linger.analysis.walk import Reader, Visit
from lightning_linger.ops.recurrent.call import RecurrentCall, directions_of


def read_recurrent(visit: Visit) -> None:
    """Read a recurrent layer: one pass per layer and direction, joined where there are two."""
    call: RecurrentCall = visit.call
    x = visit.operand(0)
    time, batch = _sizes(call, x)
    traits = set()
    if any(state.constant or visit.walk.is_computed(state) for state in call.states):
        traits.add("initial_state")
    if call.batch_sizes is not None:
        traits.add("packed")
    if call.batch_sizes is not None or len(x.shape) != 3:
        traits.add("steps")
    out = visit.result(0)
    for index, directions in enumerate(directions_of(call)):
        outputs: list[Data] = []
        for direction in directions:
            hidden = direction.weight_hh.shape[1]
            y = visit.inner((*x.shape[:-1], hidden), out.bits)
            biases = [b for b in (direction.bias_ih, direction.bias_hh) if b is not None]
            weights = (tuple(direction.weight_ih.shape), tuple(direction.weight_hh.shape))
            own = set(traits) | ({"projection"} if direction.weight_hr is not None else set())
            per_step = sum(rows * columns for rows, columns in weights)
            visit.add(
                visit.node.op,
                (x,),
                (y,),
                tuple(own),
                weights=weights,
                biases=sum(b.shape[0] for b in biases),
                weight_bits=visit.weight_bits,
                macs=time * batch * per_step,
                facts={"batch": max(batch // visit.walk.batch, 1)},
            )
            outputs.append(y)
        last = index + 1 == call.num_layers
        if len(outputs) > 1:
            joined = out if last else visit.inner((*x.shape[:-1], 2 * hidden), out.bits)
            visit.add("cat", outputs, (joined,), facts={"operands": 2})
            x = joined
        else:
            x = outputs[0]
    visit.walk.define(visit.node.outputs[0], x.reshaped(visit.node.outputs[0].shape))
    for position in range(1, len(visit.node.outputs)):
        visit.result(position, out.bits)


def _sizes(call: RecurrentCall, x: Data) -> tuple[int, int]:
    """Return the number of steps and of sequences."""
    if len(x.shape) < 3:
        return 1, x.shape[0]
    batch, time = x.shape[:2] if call.batch_first else (x.shape[1], x.shape[0])
    return time, batch


READERS: dict[str, Reader] = {
    kind + suffix: read_recurrent
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for suffix in ("", "_cell")
}
