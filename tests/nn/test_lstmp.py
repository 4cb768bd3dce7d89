"""LSTMP and UBLSTMP against nn.LSTM and against the recurrence written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import lightning_linger as linger
from lightning_linger.core.errors import ConfigError
from lightning_linger.nn import LSTMP, UBLSTMP
from tests.models import Lambda, assert_integer_exact

INPUT, HIDDEN, CELL, BATCH, TIME = 4, 3, 6, 2, 5
LENGTHS = [[5, 3, 1], [2, 5, 4], [4, 4, 4]]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def reference(layer: LSTMP) -> nn.LSTM:
    """The nn.LSTM of the same weights, forward in time."""
    lstm = nn.LSTM(INPUT, CELL, proj_size=HIDDEN, batch_first=layer.batch_first)
    lstm.to(layer.input_linearity.weight.dtype)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(layer.input_linearity.weight)
        lstm.weight_hh_l0.copy_(layer.state_linearity.weight)
        lstm.bias_ih_l0.copy_(layer.input_linearity.bias)
        lstm.bias_hh_l0.zero_()
        lstm.weight_hr_l0.copy_(layer.state_projection.weight)
    return lstm


def bidirectional_reference(layer: UBLSTMP, batch_first: bool = True) -> nn.LSTM:
    """The bidirectional nn.LSTM of the same weights."""
    lstm = nn.LSTM(INPUT, CELL, proj_size=HIDDEN, batch_first=batch_first, bidirectional=True)
    lstm.to(layer.forward_lstmp.input_linearity.weight.dtype)
    for half, suffix in ((layer.forward_lstmp, ""), (layer.backward_lstmp, "_reverse")):
        for name, value in reference(half).state_dict().items():
            lstm.state_dict()[name + suffix].copy_(value)
    return lstm


def states(*sizes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*sizes, HIDDEN), torch.randn(*sizes, CELL)


def sequences(batch_first: bool = True, batch: int = BATCH) -> Tensor:
    x = torch.randn(batch, TIME, INPUT)
    return x if batch_first else x.transpose(0, 1).contiguous()


def assert_equal(found: Any, wanted: Any) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)


def assert_close(found: Any, wanted: Any) -> None:
    """For float64 sums in another order: rounding alone, some 1e-16 in each of a few dozen."""
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert one.dtype == other.dtype == torch.float64 or not one.is_floating_point()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_forward_equals_nn_lstm(batch_first: bool, with_state: bool) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL, batch_first=batch_first)
    x, state = sequences(batch_first), states(1, BATCH) if with_state else None
    output, (hidden, cell) = layer(x, state)
    assert_equal((output, (hidden, cell)), reference(layer)(x, state))
    assert hidden.shape == (1, BATCH, HIDDEN)
    assert cell.shape == (1, BATCH, CELL)


@pytest.mark.parametrize("batch_first", [True, False])
def test_backward_direction_reads_the_end_first(batch_first: bool) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL, batch_first=batch_first, go_forward=False)
    x, state, time = sequences(batch_first), states(1, BATCH), 1 if batch_first else 0
    wanted, last = reference(layer)(x.flip(time), state)
    assert_equal(layer(x, state), (wanted.flip(time), last))


def test_the_recurrence_is_the_documented_one() -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL).double()
    x = sequences().double()
    (h, c), outputs = (state.double() for state in states(BATCH)), []
    output, (hidden, cell) = layer(x, (h, c))
    for t in range(TIME):
        gates = x[:, t] @ layer.input_linearity.weight.T + layer.input_linearity.bias
        i, f, g, o = (gates + h @ layer.state_linearity.weight.T).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ layer.state_projection.weight.T
        outputs.append(h)
    assert_close((output, hidden[0], cell[0]), (torch.stack(outputs, 1), h, c))


@pytest.mark.parametrize("go_forward", [True, False])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_states_with_and_without_the_leading_axis(batch: int, go_forward: bool) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL, go_forward=go_forward)
    x, (h, c) = sequences(batch=batch), states(1, batch)
    wanted = layer(x, (h, c))
    assert_equal(layer(x, (h[0], c[0])), wanted)
    assert not torch.equal(wanted[0], layer(x)[0])


@pytest.mark.parametrize("go_forward", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences_are_each_a_sequence_of_their_own(
    lengths: list[int], go_forward: bool
) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL, go_forward=go_forward).double()
    x, (h, c) = tree_map(Tensor.double, (sequences(batch=3), states(1, 3)))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, (hidden, cell) = layer(packed, (h, c))
    assert isinstance(output, PackedSequence)
    padded, found_lengths = pad_packed_sequence(output, batch_first=True)
    assert found_lengths.tolist() == lengths
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        # Alone, the matrices have other sizes and may be multiplied in another order.
        alone = layer(x[one, :length], (h[:, one], c[:, one]))
        assert_close((padded[one, :length], (hidden[:, one], cell[:, one])), alone)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_forward_equals_nn_lstm(lengths: list[int]) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL)
    x = pack_padded_sequence(sequences(batch=3), lengths, batch_first=True, enforce_sorted=False)
    state = states(1, 3)
    assert_equal(layer(x, state), reference(layer)(x, state))
    assert_equal(layer(x), reference(layer)(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_ublstmp_equals_a_bidirectional_nn_lstm(batch_first: bool, with_state: bool) -> None:
    # The rows of the reversed input stand elsewhere in their matrix, so sums may differ in order.
    layer = UBLSTMP(INPUT, HIDDEN, CELL, batch_first=batch_first).double()
    x, state = tree_map(Tensor.double, (sequences(batch_first), states(2, BATCH)))
    state = state if with_state else None
    output, (hidden, cell) = layer(x, state)
    assert_close((output, (hidden, cell)), bidirectional_reference(layer, batch_first)(x, state))
    assert hidden.shape == (2, BATCH, HIDDEN)
    assert cell.shape == (2, BATCH, CELL)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_ublstmp_equals_a_bidirectional_nn_lstm(lengths: list[int]) -> None:
    # Steps hold other numbers of sequences than in nn.LSTM, so the order of sums may differ.
    layer = UBLSTMP(INPUT, HIDDEN, CELL).double()
    x, state = tree_map(Tensor.double, (sequences(batch=3), states(2, 3)))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    wanted = bidirectional_reference(layer)(packed, state)
    assert_close(layer(packed, state), wanted)


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.lstm: list[tuple[Any, ...]] = []
        self.linear = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._VF.lstm:
            self.lstm.append(args)
        self.linear += func is nn.functional.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("go_forward", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_one_call_like_that_of_nn_lstm(packed: bool, go_forward: bool) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL, go_forward=go_forward)
    x: Any = sequences()
    if packed:
        x = pack_padded_sequence(x, [5, 2], batch_first=True)
    lstm = reference(layer)
    with Calls() as found:
        layer(x)
    with Calls() as wanted:
        lstm(x)
    assert len(found.lstm) == len(wanted.lstm) == 1
    assert found.linear == 0
    for one, other in zip(found.lstm[0], wanted.lstm[0], strict=True):
        assert type(one) is type(other)
        if isinstance(one, list | tuple):
            assert_equal(one, other)
        elif not isinstance(one, Tensor):
            assert one == other


def test_parameters_have_the_names_and_shapes_of_the_layout() -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "input_linearity.weight": (4 * CELL, INPUT),
        "input_linearity.bias": (4 * CELL,),
        "state_linearity.weight": (4 * CELL, HIDDEN),
        "state_projection.weight": (HIDDEN, CELL),
    }
    assert list(UBLSTMP(INPUT, HIDDEN, CELL).state_dict()) == [
        f"{half}_lstmp.{name}" for half in ("forward", "backward") for name in shapes
    ]
    assert all(p.abs().max() <= CELL**-0.5 for p in layer.parameters())
    assert all(p.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("kind", ["forward", "backward", "both"])
def test_gradients(kind: str) -> None:
    layer: Any = (
        UBLSTMP(2, 1, 2) if kind == "both" else LSTMP(2, 1, 2, go_forward=kind == "forward")
    )
    layer = layer.double()
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    rows = 2 if kind == "both" else 1
    h = torch.randn(rows, 2, 1, dtype=torch.float64, requires_grad=True)
    c = torch.randn(rows, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    values = [value.detach().requires_grad_() for value in layer.parameters()]

    def run(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> Any:
        named = dict(zip(names, parameters, strict=True))
        return tree_leaves(torch.func.functional_call(layer, named, (x, (h, c))))[:3]

    assert torch.autograd.gradcheck(lambda *a: tuple(run(*a)), (x, h, c, *values))


def test_gradients_of_packed_backward() -> None:
    layer = LSTMP(2, 1, 2, go_forward=False).double()
    batch_sizes = pack_padded_sequence(torch.zeros(2, 3, 2), [3, 2], batch_first=True).batch_sizes
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def run(rows: Tensor) -> Tensor:
        return layer(PackedSequence(rows, batch_sizes))[0].data

    assert torch.autograd.gradcheck(run, (rows,))


@pytest.mark.parametrize("go_forward", [True, False])
def test_survives_copy_dtype_and_capture(go_forward: bool) -> None:
    layer = LSTMP(INPUT, HIDDEN, CELL, go_forward=go_forward).eval()
    x = sequences()
    wanted = layer(x)
    assert_equal(copy.deepcopy(layer)(x), wanted)
    exported = torch.export.export(layer, (x,)).module()
    assert_equal(exported(x), wanted)
    double = copy.deepcopy(layer).double()(x.double())
    assert double[0].dtype == torch.float64
    torch.testing.assert_close(double[0].float(), wanted[0], rtol=0, atol=1e-6)


def test_materialised_from_the_meta_device() -> None:
    wanted = LSTMP(INPUT, HIDDEN, CELL)
    with torch.device("meta"):
        layer = LSTMP(INPUT, HIDDEN, CELL)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer._no_bias.fill_(torch.nan)
    layer.load_state_dict(wanted.state_dict())
    x = sequences()
    assert_equal(layer(x), wanted(x))
    with torch.no_grad():
        layer._no_bias.fill_(torch.nan)
    layer.reset_parameters()
    assert layer(x)[0].isfinite().all()


@pytest.mark.parametrize("go_forward", [True, False])
def test_in_a_quantized_model(go_forward: bool) -> None:
    model = Lambda(
        lambda self, x: self.after(self.rnn(self.before(x))[0]),
        before=nn.Linear(7, INPUT),
        rnn=LSTMP(INPUT, HIDDEN, CELL, go_forward=go_forward),
        after=nn.Linear(HIDDEN, 2),
    )
    x = torch.randn(2, 5, 7)
    linger.quantize(linger.prepare(model, (x,)))
    model.train()(x)
    assert [row.site for row in linger.summary(model) if row.op == "lstm"] == ["rnn/lstm/0"]
    assert_integer_exact(model.eval(), x)


SIZES = {
    "zero": ((4, 0, 6), r"`hidden_size`.*positive.*0"),
    "fraction": ((4.0, 3, 6), r"`input_size`.*integer.*4\.0"),
    "truth": ((4, 3, True), r"`cell_size`.*integer.*True"),
    "swapped": ((4, 6, 3), r"less than `cell_size`.*6 and 3.*last"),
    "equal": ((4, 6, 6), r"less than `cell_size`"),
}


@pytest.mark.parametrize("kind", [LSTMP, UBLSTMP])
@pytest.mark.parametrize(("sizes", "message"), SIZES.values(), ids=SIZES.keys())
def test_sizes_are_checked(kind: Any, sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=kind.__name__ + ".*" + message):
        kind(*sizes)


X = torch.zeros(BATCH, TIME, INPUT)
H, C = torch.zeros(1, BATCH, HIDDEN), torch.zeros(1, BATCH, CELL)
PACKED = pack_padded_sequence(torch.zeros(BATCH, TIME, INPUT + 1), [5, 2], batch_first=True)
INPUTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "no batch": ((X[0],), r"\(5, 4\).*\(batch, time, 4\).*unsqueeze"),
    "features": ((X[..., :2],), r"\(2, 5, 2\).*\(batch, time, 4\)"),
    "packed features": ((PACKED,), r"\(7, 5\).*\(rows, 4\)"),
    "no pair": ((X, H), r"pair \(output, cell\), got Tensor"),
    "swapped state": ((X, (C, H)), r"initial output.*\(1, 2, 3\) or \(2, 3\), got \(1, 2, 6\)"),
    "cell size": ((X, (H, H)), r"initial cell.*\(1, 2, 6\).*got \(1, 2, 3\)"),
    "batch size": ((X, (H[:, :1], C)), r"initial output.*got \(1, 1, 3\)"),
    "no tensor": ((X, (None, C)), r"initial output.*got NoneType"),
}


@pytest.mark.parametrize(("arguments", "message"), INPUTS.values(), ids=INPUTS.keys())
def test_inputs_are_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=r"LSTMP\(4, 3, 6, batch_first=True.*" + message):
        LSTMP(INPUT, HIDDEN, CELL)(*arguments)


def test_ublstmp_inputs_are_checked() -> None:
    layer = UBLSTMP(INPUT, HIDDEN, CELL)
    with pytest.raises(ConfigError, match=r"UBLSTMP\(4, 3, 6.*\(2, 2, 3\), got \(1, 2, 3\)"):
        layer(X, (H, C))
    with pytest.raises(ConfigError, match=r"\(4,\).*\(batch, time, 4\)"):
        layer(X[0, 0], (H, C))
    with pytest.raises(ConfigError, match=r"time, batch"):
        UBLSTMP(INPUT, HIDDEN, CELL, batch_first=False)(X[0])


def test_repr() -> None:
    assert repr(LSTMP(4, 3, 6, go_forward=False)).startswith(
        "LSTMP(\n  4, 3, 6, batch_first=True, go_forward=False\n"
    )
