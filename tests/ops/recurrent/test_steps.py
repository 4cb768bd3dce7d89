"""Fused, step by step and compiled: the same bits."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.ops.recurrent import compiled, loop
from tests.models import Lambda, trained
from tests.ops.recurrent.layers import (
    LAYERS,
    LENGTHS,
    equal,
    fixed,
    layer_site,
    packed_forward,
    plain,
)


@pytest.mark.parametrize("platform", ["venusa", "venus", "onnxruntime"])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_row64_fused_equals_step_by_step(kind, options, platform):
    model = plain(kind, 4, 6, 2, bidirectional=True, **options)
    x = torch.randn(5, 3, 4)
    twin = copy.deepcopy(model)
    for network, fused in ((model, True), (twin, False)):
        trained(network, x, config=QuantConfig(platform=platform, fused_rnn=fused), lr=0.1)
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))
    with torch.no_grad():
        expected = model(x)
        assert equal(expected, twin(x))
        with linger.fused_rnn(False):
            assert equal(expected, model(x))
        with linger.integer(model), linger.fused_rnn(False):
            assert equal(expected, model(x))


@pytest.mark.parametrize(("kind", "options"), [*LAYERS, ("LSTM", {"proj_size": 3})])
def test_step_by_step_agrees_with_torch_in_the_float_stage(kind, options):
    layer = getattr(nn, kind)(4, 6, 2, bidirectional=True, batch_first=True, **options)
    model = Lambda(packed_forward, first=nn.Linear(4, 4), rnn=layer)
    x = torch.randn(4, 7, 4)
    model.eval()
    with torch.no_grad():
        expected = model(x, LENGTHS)
        linger.normalize(linger.prepare(model, (x, LENGTHS)), weight=8.0)
        assert equal(model(x, LENGTHS), expected)
        with linger.fused_rnn(False):
            stepwise = model(x, LENGTHS)
    for a, b in zip(tree_leaves(stepwise), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_row64_the_switch_nests_and_belongs_to_its_thread():
    from lightning_linger.ops.recurrent.fusion import is_fused

    model = trained(plain("LSTM", 4, 6), torch.randn(5, 3, 4))
    site, seen = layer_site(model), []
    assert is_fused(site)
    with linger.fused_rnn(False):
        assert not is_fused(site)
        with linger.fused_rnn(True):
            assert is_fused(site)
        assert not is_fused(site)
        thread = threading.Thread(target=lambda: seen.append(is_fused(site)))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), linger.fused_rnn(True):
            assert 1 / 0
        assert not is_fused(site)
    assert is_fused(site)
    assert seen == [True]


def test_the_switch_takes_three_values():
    match = r"`fused_rnn` must be True, False or 'compiled'. Found: 'no'"
    with pytest.raises(ConfigError, match=match):
        QuantConfig(fused_rnn="no")
    with pytest.raises(ConfigError, match=match), linger.fused_rnn("no"):
        pass
    with linger.fused_rnn("compiled"):
        assert QuantConfig(fused_rnn="compiled").fused_rnn == "compiled"


# --- compiled -----------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """What is compiled from here on."""
    found = compiled.CompiledSteps()
    monkeypatch.setattr(loop, "STEPS", found)
    return found


@pytest.mark.parametrize(
    ("kind", "options", "platform"),
    [
        ("LSTM", {}, "venusa"),
        *(
            pytest.param(kind, options, platform, marks=pytest.mark.slow)
            for platform in ("venusa", "venus", "onnxruntime")
            for kind, options in [*LAYERS, ("LSTM", {"proj_size": 3})]
            if (kind, options, platform) != ("LSTM", {}, "venusa")
        ),
    ],
)
def test_compiled_steps_equal_the_others(kind, options, platform, steps):
    # A step that moves would be compiled again.
    config = fixed(platform=platform, fused_rnn="compiled")
    model = plain(kind, 4, 6, **options)
    x = torch.randn(5, 3, 4)
    twin = copy.deepcopy(model)
    trained(model, x, config=config, lr=0.1)
    free = platform == "onnxruntime"
    assert len(steps) == (0 if free else 1)
    trained(twin, x, config=dataclasses.replace(config, fused_rnn=True), lr=0.1)
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))
    model.eval()
    twin.eval()
    with torch.no_grad():
        expected = twin(x)
        assert equal(expected, model(x))
        with linger.integer(model):
            found = model(x)
        assert len(steps) == (1 if free else 2)
        with linger.integer(twin):
            assert equal(found, twin(x))
        with torch.inference_mode(), linger.integer(model):  # as in a Trainer's validation
            assert equal(found, model(x))
        # The switch wins over the configuration, and nothing else is compiled.
        with linger.integer(model), linger.fused_rnn(False):
            assert equal(found, model(x))
    assert len(steps) == (1 if free else 2)


def test_what_cannot_be_compiled_runs_as_it_is(steps, monkeypatch, caplog):
    model = trained(plain("GRU", 4, 6), torch.randn(5, 3, 4))
    x = torch.randn(5, 3, 4)
    with torch.no_grad(), linger.integer(model):
        expected = model(x)

    def refuse(*args, **kwargs):
        msg = "no C++ compiler\nand more"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch, "compile", refuse)
    with torch.no_grad(), linger.integer(model), linger.fused_rnn("compiled"):
        assert equal(model(x), expected)
        assert equal(model(x), expected)
    assert len(steps) == 0
    said = [record.getMessage() for record in caplog.records if record.name == "lightning_linger"]
    assert said == ["recurrent layers run without being compiled: RuntimeError: no C++ compiler"]


def test_one_step_and_different_lengths_are_not_compiled(steps, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)  # would be called, and fail
    layer = nn.LSTM(4, 6, batch_first=True)
    model = Lambda(packed_forward, first=nn.Linear(4, 4), rnn=layer)
    x = torch.randn(4, 7, 4)
    linger.quantize(linger.prepare(model, (x, LENGTHS)), fixed())
    with torch.no_grad(), linger.integer(model.eval()):
        expected = model(x, LENGTHS)
        with linger.fused_rnn("compiled"):
            assert equal(model(x, LENGTHS), expected)
    one = linger.quantize(linger.prepare(plain("LSTM", 4, 6), (x[:1],)), fixed()).eval()
    with torch.no_grad(), linger.integer(one), linger.fused_rnn("compiled"):
        one(x[:1])
    assert len(steps) == 0
    assert not steps.failed


def test_captures_compile_nothing(steps):
    model = trained(plain("LSTM", 4, 6), torch.randn(5, 3, 4)).eval()
    x = torch.randn(5, 3, 4)
    with torch.no_grad(), linger.integer(model):
        expected = model(x)  # fills what a capture reads
        with linger.fused_rnn("compiled"):
            program = torch.export.export(model, (x,), strict=False)
            assert equal(program.module()(x), expected)
    assert len(steps) == 0
