"""LSTM with projection that runs in one direction, forward or backward in time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_linger.core.errors import ConfigError

State = tuple[Tensor, Tensor]


class Linearity(nn.Module):
    """The weight and the bias of a linear map that is computed elsewhere.

    It is no `nn.Linear`: nothing calls it, and what a user does to all linear layers is not meant
    for the gates of an LSTM.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


class LSTMP(nn.Module):
    """LSTM with projection and without peepholes, one layer, one direction.

    With ``i, f, g, o`` the four gates and ``h`` the projected state, for each step ``t``::

        i, f, g, o = W_input x[t] + b + W_state h[t-1]
        c[t] = sigmoid(f) * c[t-1] + sigmoid(i) * tanh(g)
        h[t] = W_projection (sigmoid(o) * tanh(c[t]))

    This is what ``nn.LSTM(input_size, cell_size, proj_size=hidden_size)`` computes with one bias
    instead of two (Sak et al. 2014, https://arxiv.org/abs/1402.1128, without peepholes), and it is
    computed by the same single call. Mind the order of the sizes: ``nn.LSTM`` calls the size of the
    cell ``hidden_size``.

    Parameters: ``input_linearity.weight`` (4 * cell_size, input_size), ``input_linearity.bias``
    (4 * cell_size), ``state_linearity.weight`` (4 * cell_size, hidden_size) and
    ``state_projection.weight`` (hidden_size, cell_size), with gates in the order i, f, g, o.

    Args:
        input_size: Features of the input, positive.
        hidden_size: Features of the output, the size of the projection; less than ``cell_size``.
        cell_size: Features of the cell.
        batch_first: Whether input and output are (batch, time, features) rather than (time, batch,
            features). A packed sequence has neither.
        go_forward: Whether time runs forward. Backward, the first step reads the last valid input,
            and outputs stand where their inputs stood, as in the second half of a bidirectional
            ``nn.LSTM``.

    Raises:
        ConfigError: If a size is not positive, or ``hidden_size`` is not less than ``cell_size``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell_size: int,
        batch_first: bool = True,
        go_forward: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, input_size, hidden_size, cell_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.cell_size = cell_size
        self.batch_first = batch_first
        self.go_forward = go_forward
        self.input_linearity = Linearity(input_size, 4 * cell_size, bias=True)
        self.state_linearity = Linearity(hidden_size, 4 * cell_size, bias=False)
        self.state_projection = Linearity(cell_size, hidden_size, bias=False)
        # The function wants a second bias. A buffer, so that whoever prepares weights once can
        # prepare this too.
        self.register_buffer("_no_bias", torch.zeros(4 * cell_size), persistent=False)
        register: Any = self.register_load_state_dict_post_hook
        register(_clear_no_bias)
        self.reset_parameters()

    _no_bias: Tensor

    def reset_parameters(self) -> None:
        """Draw all parameters from +-1 / sqrt(cell_size), as `nn.LSTM` does."""
        bound = 1 / math.sqrt(self.cell_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.zeros_(self._no_bias)

    def forward(
        self, input: Tensor | PackedSequence, initial_state: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run over the sequence.

        Args:
            input: (batch, time, input_size), or (time, batch, input_size) without ``batch_first``,
                or a packed sequence, which is reversed by the length of each of its sequences.
            initial_state: Output and cell before the first step, (1, batch, hidden_size) and
                (1, batch, cell_size), with or without the leading 1. Zeros if None.

        Returns:
            The outputs, shaped like the input with ``hidden_size`` features; and output and cell
            after the last step (backward: after the step that reads the first input), of shapes
            (1, batch, hidden_size) and (1, batch, cell_size).

        Raises:
            ConfigError: If a shape is another.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, initial_state)
        self.check_input(input)
        batch_axis, time_axis = (0, 1) if self.batch_first else (1, 0)
        state = self._state(initial_state, input, input.shape[batch_axis])
        x = input if self.go_forward else input.flip(time_axis)
        output, hidden, cell = torch.lstm(
            x, state, self._weights(), True, 1, 0.0, self.training, False, self.batch_first
        )
        return output if self.go_forward else output.flip(time_axis), (hidden, cell)

    def _forward_packed(
        self, packed: PackedSequence, initial_state: State | None
    ) -> tuple[PackedSequence, State]:
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        self.check_input(x, dim=2)
        state = self._state(initial_state, x, int(batch_sizes[0]))
        if initial_state is not None:
            state = _permuted(state, sorted_indices)
        rows = None if self.go_forward else reversed_rows(batch_sizes).to(x.device)
        if rows is not None:
            x = x.index_select(0, rows)
        output, hidden, cell = torch.lstm(
            x, batch_sizes, state, self._weights(), True, 1, 0.0, self.training, False
        )
        if rows is not None:
            output = output.index_select(0, rows)
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, _permuted((hidden, cell), unsorted_indices)

    def _weights(self) -> list[Tensor]:
        bias = self.input_linearity.bias
        assert bias is not None
        return [
            self.input_linearity.weight,
            self.state_linearity.weight,
            bias,
            self._no_bias,
            self.state_projection.weight,
        ]

    def check_input(self, x: Tensor, dim: int = 3) -> None:
        """Raise a `ConfigError` unless ``x`` is a sequence, or the rows of a packed one."""
        if x.dim() != dim or x.shape[-1] != self.input_size:
            axes = "(batch, time" if self.batch_first else "(time, batch"
            wanted = f"{axes}, {self.input_size})" if dim == 3 else f"(rows, {self.input_size})"
            msg = f"{name_of(self)}: the input has shape {tuple(x.shape)}; it must be {wanted}."
            if dim == 3 and x.dim() == 2:
                msg += " Add a batch axis with `unsqueeze`."
            raise ConfigError(msg)

    def _state(self, state: State | None, x: Tensor, batch: int) -> State:
        if state is None:
            hidden = torch.zeros(1, batch, self.hidden_size, dtype=x.dtype, device=x.device)
            return hidden, torch.zeros(1, batch, self.cell_size, dtype=x.dtype, device=x.device)
        hidden, cell = check_state(self, state, 1, batch, self.hidden_size, self.cell_size)
        return (
            hidden if hidden.dim() == 3 else hidden.unsqueeze(0),
            cell if cell.dim() == 3 else cell.unsqueeze(0),
        )

    def extra_repr(self) -> str:
        """Describe the layer by its arguments."""
        return (
            f"{self.input_size}, {self.hidden_size}, {self.cell_size}, "
            f"batch_first={self.batch_first}, go_forward={self.go_forward}"
        )


def name_of(layer: nn.Module) -> str:
    """Return how a layer is named in an error."""
    return f"{type(layer).__name__}({layer.extra_repr()})"


def check_sizes(layer: str, input_size: int, hidden_size: int, cell_size: int) -> None:
    """Raise a `ConfigError` unless the sizes are those of a projected LSTM."""
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "cell_size": cell_size}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            msg = f"{layer}: `{name}` must be a positive integer, got {size!r}."
            raise ConfigError(msg)
    if hidden_size >= cell_size:
        msg = (
            f"{layer}: `hidden_size`, the size of the projection, must be less than `cell_size`, "
            f"got {hidden_size} and {cell_size}. nn.LSTM and pytorch-asr-extension take the size "
            "of the cell first; here it comes last."
        )
        raise ConfigError(msg)


def check_state(
    layer: nn.Module, state: Any, directions: int, batch: int, hidden_size: int, cell_size: int
) -> State:
    """Return an initial state.

    Raises:
        ConfigError: If it is not a pair of tensors of the right shapes.
    """
    if not isinstance(state, tuple | list) or len(state) != 2:
        kind = type(state).__name__
        msg = f"{name_of(layer)}: `initial_state` must be a pair (output, cell), got {kind}."
        raise ConfigError(msg)
    for name, x, size in (("output", state[0], hidden_size), ("cell", state[1], cell_size)):
        allowed = [(directions, batch, size)] + [(batch, size)] * (directions == 1)
        if not isinstance(x, Tensor) or tuple(x.shape) not in allowed:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            msg = (
                f"{name_of(layer)}: the initial {name} must have shape "
                f"{' or '.join(str(shape) for shape in allowed)}, got {got}."
            )
            raise ConfigError(msg)
    return state[0], state[1]


def reversed_rows(batch_sizes: Tensor) -> Tensor:
    """Return, for each row of packed data, the row that takes its place when time is reversed.

    Row ``(t, b)`` of a sequence of length ``n`` trades places with row ``(n - 1 - t, b)``.

    Args:
        batch_sizes: Of the packed sequence: sequences longer than ``t``, for each step ``t``.
    """
    starts = batch_sizes.cumsum(0) - batch_sizes
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(int(batch_sizes[0]))).sum(0)
    step = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)
    sequence = torch.arange(len(step)) - starts[step]
    return starts[lengths[sequence] - 1 - step] + sequence


def _permuted(state: State, indices: Tensor | None) -> State:
    if indices is None:
        return state
    return state[0].index_select(1, indices), state[1].index_select(1, indices)


def _clear_no_bias(module: LSTMP, _: Any) -> None:
    # Built on the meta device and materialised with `to_empty`, only what is loaded has a value.
    nn.init.zeros_(module._no_bias)
