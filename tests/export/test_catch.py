"""State dicts of Cambricon's CATCH: what is written, what is read, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_linger as linger
from lightning_linger.cli import main
from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.export.catch import (
    encode_channels,
    encode_position,
    from_catch,
    load_catch,
    reach_of,
    read_layers,
    scale_of,
    settings_of,
    to_catch,
)
from tests.models import Chain, Lambda
from tests.stages.test_firstconv import IMAGENET, by_hand, raw_images
from tests.stages.test_mlu import WIDE, Net, config, data, net, run

LAYERS = ("early", "late", "fc")


def catch_scale(absmax: Any, qmax: int) -> Any:
    return (np.float32(qmax) / np.asarray(absmax, np.float32)).astype(np.float32)


def calibrated(firstconv: bool = False, **arguments: Any) -> nn.Module:
    given = {"config": config(), **arguments}
    return linger.calibrate(net(), data(), firstconv=IMAGENET if firstconv else None, **given)


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    """Both widths, a scale per channel, and raw images."""
    per_channel = {"granularity": "channel", **WIDE}
    model = calibrated(True, overrides={"late": WIDE, "fc": per_channel})
    return model.state_dict()


# --- out ----------------------------------------------------------------------------------------


def test_row47_the_keys_of_catch(mixed: dict[str, Any]) -> None:
    found = to_catch(mixed)
    plain = net().state_dict()
    assert {key: tuple(value.shape) for key, value in found.items() if key not in plain} == {
        **{f"{name}.use_symmetry": (1,) for name in LAYERS},
        **{f"{name}.quantized_mode": (1,) for name in LAYERS},
        **{f"{name}.scale": (2,) for name in LAYERS},
        "fc.quantized_by_channel": (1,),
        "fc.scale_weight_per_channel": (5,),
        "early.input_mean": (1, 3, 1, 1),
        "early.input_std": (1, 3, 1, 1),
    }
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert [found[f"{name}.quantized_mode"].tolist() for name in LAYERS] == [[1], [2], [2]]
    dtypes = {key.rpartition(".")[2]: found[key].dtype for key in found if key not in plain}
    assert dtypes == {
        "use_symmetry": torch.int64,
        "quantized_mode": torch.int32,
        "scale": torch.float32,
        "quantized_by_channel": torch.int64,
        "scale_weight_per_channel": torch.float32,
        "input_mean": torch.float32,
        "input_std": torch.float32,
    }
    absmax = torch.stack(data()).abs().max().item()
    weights = {name: found[f"{name}.weight"].abs() for name in LAYERS}
    assert found["early.scale"].numpy() == pytest.approx(
        catch_scale([absmax, weights["early"].max().item()], 127), rel=0
    )
    assert found["late.scale"][1] == catch_scale(weights["late"].max().item(), 32767)
    assert found["fc.scale"][1] == 0
    assert np.array_equal(
        found["fc.scale_weight_per_channel"].numpy(),
        catch_scale(weights["fc"].amax(1).numpy(), 32767),
    )
    assert np.array_equal(
        found["early.input_mean"].flatten().numpy(),
        np.array(IMAGENET.mean, np.float32) * np.float32(255),
    )


def test_row47_the_scales_that_were_measured() -> None:
    layer = nn.Linear(2, 2, bias=False)
    for settings_, expected in (({}, 30.9643), (WIDE, 7989.04)):
        plain = nn.Linear(2, 2)
        plain.load_state_dict(layer.state_dict(), strict=False)
        x = torch.tensor([[4.10149, -1.0]])
        state = linger.calibrate(plain, [x], config(**settings_)).state_dict()
        assert to_catch(state)["scale"][0].item() == pytest.approx(expected, rel=1e-5)


def test_row47_the_form_after_loading(mixed: dict[str, Any]) -> None:
    found, joined = to_catch(mixed), to_catch(mixed, joined=True)
    assert [joined[f"{name}.quantized_mode"].item() for name in LAYERS] == [1, 2, 4]
    assert torch.equal(
        joined["fc.scale"], torch.cat([found["fc.scale"], found["fc.scale_weight_per_channel"]])
    )
    narrow = calibrated(config=config(granularity="channel")).state_dict()
    assert to_catch(narrow)["early.quantized_mode"].item() == 1
    assert to_catch(narrow, joined=True)["early.quantized_mode"].item() == 3


def test_row46_row47_without_a_range_the_scale_is_one() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    with pytest.warns(linger.QuantizationWarning, match=r"scale is 1\.0"):
        linger.calibrate(layer, [torch.zeros(2, 3)], config())
    assert to_catch(layer.state_dict())["scale"].tolist() == [1.0, 1.0]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(x))


def _functional(self: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, self.kernel)


@pytest.mark.parametrize(
    ("model", "fields", "named"),
    [
        (Twice(), {}, "`fc` is called more than once"),
        (Chain(nn.Linear(4, 4)), {"weight_bits": 4}, "found 8 and 4 bits"),
        (Chain(nn.Linear(4, 4)), {"weight_bits": 12, "activation_bits": 12}, "int8 or int16"),
        (Chain(nn.Linear(4, 4)), {"weight_range": "lsq"}, "a learned range"),
        (Lambda(_functional, kernel=nn.Parameter(torch.ones(4, 4))), {}, "not the parameter"),
    ],
    ids=["twice", "narrow", "odd", "learned", "functional"],
)
def test_row47_what_catch_has_no_place_for(
    model: nn.Module, fields: dict[str, Any], named: str
) -> None:
    linger.calibrate(model, [torch.randn(2, 4)], config(**fields))
    with pytest.raises(linger.UnsupportedError, match=named):
        to_catch(model.state_dict())


def test_row47_other_states_are_refused() -> None:
    with pytest.raises(linger.ConfigError, match="no quantization state"):
        to_catch(net().state_dict())
    x = data()[0]
    prepared = linger.prepare(net(), (x,))
    with pytest.raises(linger.ConfigError, match="no quantized layer"):
        to_catch(prepared.state_dict())
    linger.quantize(prepared, config())
    with pytest.raises(linger.ConfigError, match="`early/conv2d/0` has seen no range yet"):
        to_catch(prepared.state_dict())
    luna = linger.calibrate(net(), [x])
    with pytest.raises(linger.ConfigError, match="quantized for platform 'venusa'"):
        to_catch(luna.state_dict())
    folded = linger.fuse_bn(linger.prepare(net(), (x,)))
    linger.calibrate(folded, [x], config())
    with pytest.raises(linger.UnsupportedError, match="a batch norm is folded into it"):
        to_catch(folded.state_dict())
    transposed = linger.calibrate(nn.ConvTranspose2d(3, 2, 3), [x], config())
    with pytest.raises(linger.UnsupportedError, match="CATCH quantizes conv1d, conv2d"):
        to_catch(transposed.state_dict())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=8),
    st.sampled_from([8, 16]),
)
def test_row48_channels_have_one_position(absmax: list[float], bits: int) -> None:
    qmax = 2 ** (bits - 1) - 1
    scales = scale_of(torch.tensor(absmax), bits)
    position, factors = encode_channels(scales, bits)
    own = [encode_position(float(scale), bits) for scale in scales]
    assert min(own) <= position <= max(own)
    for reach, factor, each in zip(absmax, factors.tolist(), own, strict=True):
        # Within rounding, a code stands for `absmax / qmax` whatever the position is.
        assert 2.0**position / factor == pytest.approx(reach / qmax, rel=1e-6)
        if each == position:
            assert 0.5 < factor < 2.0


def test_row48_the_position_of_a_scale() -> None:
    assert encode_position(30.9643, 8) == -4
    assert encode_position(7989.04, 16) == -12
    assert encode_channels(torch.tensor([127.0, 127.0 / 8]), 8)[0] == -5


# --- in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("joined", [False, True])
def test_row47_there_and_back(mixed: dict[str, Any], joined: bool) -> None:
    there = to_catch(mixed, joined)
    model = load_catch(net(7), there, (data()[0],))
    assert to_catch(model.state_dict(), joined).keys() == there.keys()
    again = to_catch(model.state_dict(), joined)
    assert all(torch.equal(again[key], there[key]) for key in there)
    raw = raw_images()
    assert torch.equal(run(model, raw), run(model, by_hand(raw, IMAGENET)))
    for key, value in mixed.items():
        if key.endswith(".range"):
            reach = float(value.abs().max())
            low, high = model.state_dict()[key].tolist()
            assert low == -high
            assert abs(high / reach - 1) <= 2.0**-23, key


def test_row33_row47_the_run_model_is_the_calibrated_one(mixed: dict[str, Any]) -> None:
    """But for ranges that are one unit in the last place away."""
    model = load_catch(net(7), to_catch(mixed), (data()[0],))
    for key, value in model.state_dict().items():
        if not key.startswith("_linger."):
            assert torch.equal(value, mixed[key]), key
    x = data(4)[3]
    own = calibrated(True, overrides={"late": WIDE, "fc": {"granularity": "channel", **WIDE}})
    assert torch.allclose(run(model, x), run(own, x), atol=1e-2)


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([8, 16]))
def test_row47_a_range_keeps_its_scale(absmax: float, bits: int) -> None:
    scale = scale_of(torch.tensor([absmax]), bits)
    again = reach_of(float(scale), bits)
    assert torch.equal(scale_of(torch.tensor([again]), bits), scale)
    assert abs(again / absmax - 1) <= 2.0**-22


@pytest.mark.parametrize("absmax", [0.0, float("nan"), float("inf"), -1.0])
def test_row47_no_range_has_the_scale_one(absmax: float) -> None:
    assert scale_of(torch.tensor([absmax]), 8).tolist() == [1.0]


def test_row47_a_layer_without_bias() -> None:
    layer = nn.Linear(4, 3, bias=False)
    x = torch.randn(2, 4)
    there = to_catch(linger.calibrate(layer, [x], config()).state_dict())
    expected = run(layer, x)
    filled = {**there, "bias": torch.zeros(3)}
    loaded = load_catch(nn.Linear(4, 3, bias=False), filled, (x,))
    assert torch.allclose(run(loaded, x), expected, atol=1e-6)
    with pytest.raises(linger.ConfigError, match=r"holds what the model has not: \['bias'\]"):
        load_catch(nn.Linear(4, 3, bias=False), {**there, "bias": torch.ones(3)}, (x,))


def broken(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {key: value for key, value in {**state, **named}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"late__quantized_mode": torch.tensor([5])}, "`late.quantized_mode` is 1, 2, 3 or 4"),
        ({"late__quantized_mode": torch.tensor([3])}, r"`late.scale` has the shape \(10,\)"),
        ({"late__use_symmetry": torch.tensor([0])}, "symmetrically only"),
        ({"late__scale": None}, "no tensor `late.scale`"),
        ({"late__scale": torch.ones(3)}, r"`late.scale` has the shape \(2,\). Found: \(3,\)"),
        ({"late__scale": torch.tensor([-1.0, 1.0])}, "the scales of `late` are positive"),
        ({"late__scale": torch.tensor([1.0, 7.0])}, "weight scales of `late` are not those"),
        ({"fc__scale_weight_per_channel": None}, "no tensor `fc.scale_weight_per_channel`"),
        ({"early__input_std": None}, "no tensor `early.input_std`"),
        ({"early__input_std": torch.zeros(1, 3, 1, 1)}, "std must be in"),
        ({"bn__weight": None}, "no tensor `bn.weight`"),
        ({"bn__weight": torch.ones(7)}, r"`bn.weight` has the shape \(6,\)"),
        ({"head__weight": torch.ones(1)}, "holds what the model has not: .'head.weight'"),
        ({"late__input_mean": torch.ones(1, 1, 1, 1), "late__input_std": torch.ones(1)}, "more"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_row47_what_is_wrong_is_named(
    mixed: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    model = net()
    with pytest.raises(linger.ConfigError, match=named):
        load_catch(model, broken(to_catch(mixed), **changes), (data()[0],))
    assert not is_prepared(model)


def test_row47_models_that_are_quantized_otherwise(mixed: dict[str, Any]) -> None:
    there = to_catch(mixed)
    with pytest.raises(linger.ConfigError, match=r"`late` is .*'weight_bits': 16"):
        from_catch(there, calibrated(True).state_dict())
    model = linger.prepare(net(), (data()[0],))
    linger.quantize(model, config(), **settings_of(there))
    with pytest.raises(linger.ConfigError, match="`early` normalizes by FirstConv"):
        from_catch(there, model.state_dict())
    with pytest.raises(linger.ConfigError, match="`fc` only there"):
        from_catch(there, calibrated(overrides={"fc": None}).state_dict())
    with pytest.raises(linger.ConfigError, match="no state dict of a model quantized by CATCH"):
        read_layers(net().state_dict())


# --- the command --------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    return main(["convert-checkpoint", *map(str, arguments)])


def test_row47_the_command(
    mixed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, catch, back = (tmp_path / name for name in ("own.pt", "catch.pth", "back.pt"))
    torch.save(mixed, own)
    assert command(own, catch, "--from", "linger", "--to", "catch") == 0
    assert capsys.readouterr().out == f"{catch}: linger -> catch for early, late, fc\n"
    written = torch.load(catch, weights_only=True)
    assert all(torch.equal(value, to_catch(mixed)[key]) for key, value in written.items())
    assert command(catch, back, "--from", "catch", "--to", "linger", "--like", own) == 0
    loaded = linger.load_checkpoint(Net, back).eval()
    assert to_catch(loaded.state_dict()).keys() == written.keys()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--from", "linger", "--to", "lstmp"), "linger and catch, to each other"),
        (("--from", "catch", "--to", "catch"), "linger and catch, to each other"),
        (("--from", "catch", "--to", "linger"), "Pass --like"),
        (("--from", "linger", "--to", "catch", "--like", "x.pt"), "Leave out --like"),
        (("--from", "linger", "--to", "catch", "--prefix", "fc"), "Leave it out"),
    ],
)
def test_row47_the_command_refuses(
    options: tuple[str, ...],
    named: str,
    mixed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(mixed, tmp_path / "own.pt")
    assert command(tmp_path / "own.pt", tmp_path / "new.pt", *options) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()
