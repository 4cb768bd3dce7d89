"""Checkpoint layouts: the same outputs before and after, and back to the same dictionary."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.nn import (
    LAYOUTS,
    LSTMP,
    UBLSTMP,
    asr_to_lstmp,
    convert,
    fast_to_ublstmp,
    find_layers,
    join_bidirectional,
    lstmp_to_asr,
    lstmp_to_torch,
    split_bidirectional,
    torch_to_lstmp,
    ublstmp_to_fast,
)

INPUT, HIDDEN, CELL = 4, 3, 6
ONE_DIRECTION = ("asr", "lstmp", "torch")
TWO_DIRECTIONS = tuple(layout for layout in LAYOUTS if layout not in ONE_DIRECTION)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def asr(suffix: str = "") -> dict[str, Tensor]:
    """A checkpoint of pytorch-asr-extension, as the manual of linger describes it."""
    shapes = {
        "weight_x": (4 * CELL, INPUT),
        "weight_r": (4 * CELL, HIDDEN),
        "weight_bias": (1, 4 * CELL),
        "weight_p": (HIDDEN, CELL),
    }
    return {
        name + suffix: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()
    }


def asr_output(state: dict[str, Tensor], x: Tensor, suffix: str = "") -> Tensor:
    """What a layer of pytorch-asr-extension computes: gates in the order i, f, o, g."""
    h, c = x.new_zeros(len(x), HIDDEN), x.new_zeros(len(x), CELL)
    outputs = []
    for step in x.unbind(1):
        gates = step @ state["weight_x" + suffix].T + h @ state["weight_r" + suffix].T
        i, f, o, g = (gates + state["weight_bias" + suffix]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ state["weight_p" + suffix].T
        outputs.append(h)
    return torch.stack(outputs, 1)


class Fast(nn.Module):
    """linger's FastUBLSTMP: one nn.LSTM for each direction."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_lstmp = lstm()
        self.backward_lstmp = lstm()

    def forward(self, x: Tensor) -> Tensor:
        back = self.backward_lstmp(x.flip(1))[0].flip(1)
        return torch.cat([self.forward_lstmp(x)[0], back], -1)


class Pair(nn.Module):
    """The manual's replacement for a bidirectional nn.LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstmp = LSTMP(INPUT, HIDDEN, CELL, go_forward=True).double()
        self.lstmp2 = LSTMP(INPUT, HIDDEN, CELL, go_forward=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.lstmp(x)[0], self.lstmp2(x)[0]], -1)


class Model(nn.Module):
    """Layers at several depths, among others."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(3)
        self.first = layer()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), layer()])
        self.plain = nn.LSTM(2, 3, num_layers=2)


def lstm(**arguments: Any) -> nn.LSTM:
    return nn.LSTM(INPUT, CELL, proj_size=HIDDEN, batch_first=True, **arguments).double()


def lstmp() -> LSTMP:
    return LSTMP(INPUT, HIDDEN, CELL).double()


def ublstmp() -> UBLSTMP:
    return UBLSTMP(INPUT, HIDDEN, CELL).double()


def inputs() -> Tensor:
    return torch.randn(2, 5, INPUT, dtype=torch.float64)


def load(module: nn.Module, state: dict[str, Any]) -> Any:
    module.load_state_dict(state)
    return module


def output(module: nn.Module, x: Tensor) -> Tensor:
    found = module(x)
    return found[0] if isinstance(found, tuple) else found


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """In float64, with sums in another order: rounding alone, some 1e-16 in each of a few dozen."""
    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_asr_and_lstmp() -> None:
    state, x = asr(), inputs()
    converted = asr_to_lstmp(state)
    assert_close(output(load(lstmp(), converted), x), asr_output(state, x))
    assert_same(lstmp_to_asr(converted), state)
    layer = lstmp()
    back = lstmp_to_asr(layer.state_dict())
    assert_close(asr_output(back, x), output(layer, x))
    assert_same(asr_to_lstmp(back), layer.state_dict())


def test_torch_and_lstmp() -> None:
    old, layer, x = lstm(), lstmp(), inputs()
    # The two biases are added to the sums one by one there, and as one here.
    assert_close(output(load(layer, torch_to_lstmp(old.state_dict())), x), output(old, x))
    assert torch.equal(layer.input_linearity.bias, old.bias_ih_l0 + old.bias_hh_l0)
    back = load(lstm(), lstmp_to_torch(layer.state_dict()))
    assert torch.equal(output(back, x), output(layer, x))
    assert back.bias_hh_l0.count_nonzero() == 0
    assert_same(torch_to_lstmp(back.state_dict()), layer.state_dict())


def test_fast_and_ublstmp() -> None:
    old, layer, x = Fast(), ublstmp(), inputs()
    assert_close(output(load(layer, fast_to_ublstmp(old.state_dict())), x), output(old, x))
    back = load(Fast(), ublstmp_to_fast(layer.state_dict()))
    assert torch.equal(output(back, x), output(layer, x))
    assert_same(fast_to_ublstmp(back.state_dict()), layer.state_dict())


def test_asr_and_ublstmp() -> None:
    state, x = {**asr("_fwd"), **asr("_bwd")}, inputs()
    layer = load(ublstmp(), convert(state, "asr-ublstmp", "ublstmp"))
    back = asr_output(state, x.flip(1), "_bwd").flip(1)
    assert_close(output(layer, x), torch.cat([asr_output(state, x, "_fwd"), back], -1))
    assert_same(convert(layer.state_dict(), "ublstmp", "asr-ublstmp"), state)


def test_bidirectional_and_ublstmp() -> None:
    old, layer, x = lstm(bidirectional=True), ublstmp(), inputs()
    state = convert(old.state_dict(), "torch-bidirectional", "ublstmp")
    assert_close(output(load(layer, state), x), output(old, x))
    back = load(lstm(bidirectional=True), convert(state, "ublstmp", "torch-bidirectional"))
    # The rows of the reversed input stand elsewhere in their matrix, so sums may differ in order.
    assert_close(output(back, x), output(layer, x))


def test_bidirectional_and_the_pair_of_the_manual() -> None:
    old, pair, x = nn.ModuleDict({"lstmp": lstm(bidirectional=True)}), Pair(), inputs()
    state = convert(old.state_dict(), "torch-bidirectional", "lstmp-pair")
    assert_close(output(load(pair, state), x), output(old["lstmp"], x))
    back = convert(state, "lstmp-pair", "torch-bidirectional", prefix="lstmp")
    assert_close(output(load(old, back)["lstmp"], x), output(pair, x))


@pytest.mark.parametrize(
    ("source", "target"),
    [*permutations(ONE_DIRECTION, 2), *permutations(TWO_DIRECTIONS, 2)],
)
def test_every_round_trip_ends_where_it_began(source: str, target: str) -> None:
    one = source in ONE_DIRECTION
    state = Model(lstmp if one else ublstmp).state_dict()
    first = convert(state, "lstmp" if one else "ublstmp", source)
    there = convert(first, source, target, prefix="first")
    assert_same(convert(there, target, source, prefix="first"), first)
    assert find_layers(there, target)[0] == "first"


@pytest.mark.parametrize(("bias", "projection"), [(True, 2), (True, 0), (False, 0), (False, 2)])
def test_split_and_join(bias: bool, projection: int) -> None:
    arguments = {"bias": bias, "proj_size": projection, "batch_first": True}
    both = nn.LSTM(INPUT, CELL, bidirectional=True, **arguments).double()
    state = nn.ModuleDict({"net": both}).state_dict()
    halves = split_bidirectional(state, "net", forward="ahead", backward="deep.back")
    ahead, back = (nn.LSTM(INPUT, CELL, **arguments).double() for _ in range(2))
    nn.ModuleDict({"ahead": ahead, "deep": nn.ModuleDict({"back": back})}).load_state_dict(halves)
    x = inputs()
    found = torch.cat([output(ahead, x), output(back, x.flip(1)).flip(1)], -1)
    assert_close(found, output(both, x))
    assert_same(join_bidirectional(halves, "net", forward="ahead", backward="deep.back"), state)


def test_split_of_a_whole_layer_is_the_fast_layout() -> None:
    state = lstm(bidirectional=True).state_dict()
    split = split_bidirectional(state)
    assert_same(split, convert(state, "torch-bidirectional", "fast-ublstmp"))
    assert_same(join_bidirectional(split), state)
    gru = nn.GRU(2, 3, bidirectional=True).state_dict()
    assert_same(join_bidirectional(split_bidirectional(gru)), gru)


def test_only_the_layer_changes_and_the_input_stays() -> None:
    model = Model(lstm)
    state = model.state_dict()
    before = OrderedDict((key, value.clone()) for key, value in state.items())
    found = convert(state, "torch", "lstmp", prefix="blocks.1.")
    assert_same(state, before)
    mine = [key for key in found if key.startswith("blocks.1.")]
    assert mine == ["blocks.1." + name for name in lstmp().state_dict()]
    rest = [key for key in state if not key.startswith("blocks.1.")]
    assert [key for key in found if key not in mine] == rest
    assert all(found[key] is state[key] for key in rest)
    # In its place, with the versions that modules write into a state dict.
    assert list(found).index(mine[0]) == list(state).index("blocks.1.weight_ih_l0")
    # torch sets the attribute on a plain OrderedDict, whose type has none.
    assert found._metadata == state._metadata  # type: ignore[attr-defined]


def test_without_a_prefix_every_layer_is_converted() -> None:
    state = convert(Model(lstm).state_dict(), "torch", "lstmp")
    assert find_layers(state, "lstmp") == ["first", "blocks.1"]
    assert find_layers(state, "torch") == []
    load(Model(lstmp), state)


def test_what_is_found_where() -> None:
    found = {
        layout: find_layers(convert(ublstmp().state_dict(), "ublstmp", layout), layout)
        for layout in TWO_DIRECTIONS
        if layout != "lstmp-pair"
    }
    assert found == {layout: [""] for layout in found}
    assert find_layers(ublstmp().state_dict(), "lstmp") == ["forward_lstmp", "backward_lstmp"]
    assert find_layers(lstm(bidirectional=True).state_dict(), "torch") == []
    assert find_layers(Pair().state_dict(), "lstmp-pair") == ["lstmp"]
    assert find_layers(lstmp().state_dict(), "lstmp-pair") == []
    assert find_layers({"net.other_weight_p": torch.ones(1)}, "asr") == []


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def _three_gates() -> dict[str, Any]:
    return {**asr(), "weight_x": torch.zeros(3 * CELL, INPUT)}


def _two_sizes() -> dict[str, Any]:
    state = lstm(bidirectional=True).state_dict()
    return {**state, "weight_hh_l0_reverse": torch.zeros(1, 1)}


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown layout": (
        lambda: convert({}, "kaldi", "lstmp"),
        r"unknown layout 'kaldi'.*asr, lstmp, torch",
    ),
    "directions": (
        lambda: convert(asr(), "asr", "ublstmp"),
        r"1 direction.*other 2.*converts to asr, lstmp, torch",
    ),
    "nothing there": (
        lambda: asr_to_lstmp(Model(lstm).state_dict()),
        r"no layer in layout 'asr'.*'weight_p'.*torch at 'first', 'blocks\.1'",
    ),
    "nothing at the prefix": (
        lambda: torch_to_lstmp(Model(lstm).state_dict(), "frist"),
        r"at 'frist'.*'frist\.weight_hr_l0'.*torch at 'first'",
    ),
    "missing key": (
        lambda: asr_to_lstmp(without(asr(), "weight_r")),
        r"no 'weight_r', which layout 'asr' needs",
    ),
    "no projection": (
        lambda: torch_to_lstmp(nn.LSTM(2, 3).state_dict(), ""),
        r"no 'weight_hr_l0'.*without projection has no counterpart",
    ),
    "no bias": (
        lambda: torch_to_lstmp(lstm(bias=False).state_dict()),
        r"no 'bias_ih_l0'.*add zeros",
    ),
    "gates": (
        lambda: asr_to_lstmp(_three_gates()),
        r"'weight_x' has shape \(18, 4\).*\(24, 4\).*4 gates of 6 cells",
    ),
    "bias axes": (
        lambda: asr_to_lstmp({**asr(), "weight_bias": torch.zeros(4 * CELL)}),
        r"'weight_bias' has shape \(24,\).*2 axes",
    ),
    "recurrent size": (
        lambda: lstmp_to_asr({**lstmp().state_dict(), "state_linearity.weight": torch.ones(24, 2)}),
        r"'state_linearity\.weight' has shape \(24, 2\).*\(24, 3\)",
    ),
    "no tensor": (
        lambda: asr_to_lstmp({**asr(), "weight_x": 3}),
        r"'weight_x' is a int.*needs a tensor",
    ),
    "layers": (
        lambda: torch_to_lstmp(lstm(num_layers=2).state_dict()),
        r"more than one layer \('weight_ih_l1'\)",
    ),
    "bidirectional": (
        lambda: torch_to_lstmp(lstm(bidirectional=True).state_dict(), ""),
        r"is bidirectional.*'torch-bidirectional'",
    ),
    "pair without name": (
        lambda: convert(ublstmp().state_dict(), "ublstmp", "lstmp-pair"),
        r"'lstmp-pair'.*needs the name.*prefix",
    ),
    "overwrites": (
        lambda: convert(
            {
                **convert(Pair().state_dict(), "lstmp-pair", "torch-bidirectional"),
                "lstmp2.input_linearity.bias": torch.zeros(1),
            },
            "torch-bidirectional",
            "lstmp-pair",
        ),
        r"overwrite 'lstmp2\.input_linearity\.bias'",
    ),
    "split one direction": (
        lambda: split_bidirectional(lstm().state_dict()),
        r"no 'weight_ih_l0_reverse', which the bidirectional",
    ),
    "split nothing": (lambda: split_bidirectional({}, "net"), r"no 'net\.weight_ih_l0'"),
    "split layers": (
        lambda: split_bidirectional(nn.LSTM(2, 3, 2, bidirectional=True).state_dict()),
        r"more than one layer \('weight_ih_l1'\)",
    ),
    "split sizes": (
        lambda: split_bidirectional(_two_sizes()),
        r"'weight_hh_l0_reverse' has shape \(1, 1\) and 'weight_hh_l0' has \(24, 3\)",
    ),
    "split in one place": (
        lambda: split_bidirectional(_two_sizes(), forward="a", backward="a."),
        r"must differ, got 'a' twice",
    ),
    "join one": (
        lambda: join_bidirectional(nn.ModuleDict({"forward_lstmp": lstm()}).state_dict()),
        r"no 'backward_lstmp\.weight_ih_l0'",
    ),
    "join bidirectional": (
        lambda: join_bidirectional(
            Model(lambda: lstm(bidirectional=True)).state_dict(),
            "both",
            forward="first",
            backward="blocks.1",
        ),
        r"at 'first' is bidirectional",
    ),
}


@pytest.mark.parametrize(("run", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_key_and_the_remedy(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run()
