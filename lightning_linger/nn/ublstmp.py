"""Two LSTMs with projection, one in each direction, read as one bidirectional layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_linger.nn.lstmp import LSTMP, State, check_sizes, check_state


class UBLSTMP(nn.Module):
    """A forward and a backward `LSTMP` over the same input, with their outputs side by side.

    This is what ``nn.LSTM(input_size, cell_size, proj_size=hidden_size, bidirectional=True)``
    computes with one bias per direction instead of two. Both directions see the whole sequence.

    Submodules: ``forward_lstmp`` and ``backward_lstmp``, each an `LSTMP`.

    Args:
        input_size: Features of the input, positive.
        hidden_size: Features of the output of one direction; less than ``cell_size``.
        cell_size: Features of the cell of one direction.
        batch_first: Whether input and output are (batch, time, features) rather than (time, batch,
            features). A packed sequence has neither.

    Raises:
        ConfigError: If a size is not positive, or ``hidden_size`` is not less than ``cell_size``.
    """

    def __init__(
        self, input_size: int, hidden_size: int, cell_size: int, batch_first: bool = True
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, input_size, hidden_size, cell_size)
        sizes = (input_size, hidden_size, cell_size)
        self.forward_lstmp = LSTMP(*sizes, batch_first=batch_first, go_forward=True)
        self.backward_lstmp = LSTMP(*sizes, batch_first=batch_first, go_forward=False)

    def forward(
        self, input: Tensor | PackedSequence, initial_state: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run both directions over the sequence.

        Args:
            input: (batch, time, input_size), or (time, batch, input_size) without ``batch_first``,
                or a packed sequence.
            initial_state: Outputs and cells before the first step, (2, batch, hidden_size) and
                (2, batch, cell_size), the forward direction first. Zeros if None.

        Returns:
            The outputs, shaped like the input with ``2 * hidden_size`` features, those of the
            forward direction first; and the states after the last step, shaped like
            ``initial_state``.

        Raises:
            ConfigError: If a shape is another.
        """
        ahead: State | None = None
        back: State | None = None
        if initial_state is not None:
            hidden, cell = self._check_state(initial_state, input)
            ahead, back = (hidden[:1], cell[:1]), (hidden[1:], cell[1:])
        y_ahead, (hidden_ahead, cell_ahead) = self.forward_lstmp(input, ahead)
        y_back, (hidden_back, cell_back) = self.backward_lstmp(input, back)
        output: Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            output = y_ahead._replace(data=torch.cat([y_ahead.data, y_back.data], dim=-1))
        else:
            output = torch.cat([y_ahead, y_back], dim=-1)
        hidden = torch.cat([hidden_ahead, hidden_back])
        return output, (hidden, torch.cat([cell_ahead, cell_back]))

    def _check_state(self, state: State, input: Tensor | PackedSequence) -> State:
        layer = self.forward_lstmp
        if isinstance(input, PackedSequence):
            batch = int(input.batch_sizes[0])
        else:
            layer.check_input(input)
            batch = input.shape[0 if layer.batch_first else 1]
        return check_state(self, state, 2, batch, layer.hidden_size, layer.cell_size)

    def extra_repr(self) -> str:
        """Describe the layer by its arguments."""
        layer = self.forward_lstmp
        sizes = f"{layer.input_size}, {layer.hidden_size}, {layer.cell_size}"
        return f"{sizes}, batch_first={layer.batch_first}"
