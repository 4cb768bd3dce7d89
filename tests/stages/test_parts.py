"""Any combination of quantizer parts trains, and its integers are exact."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.ranges import ACCUMULATIONS, LEARNED, STATISTICS
from tests.models import ResNet, assert_integer_exact, images

PREFIXES = ["" if name == "all" else f"{name}_" for name in ACCUMULATIONS]
NAMES = [*STATISTICS, "99%"]
RANGES = st.one_of(
    st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from(NAMES)),
    st.sampled_from([*LEARNED, 4.0]),
)
WEIGHT_RANGES = st.sampled_from([*NAMES, "lsq", "tqt", 0.5])


@settings(max_examples=12)
@given(
    config=st.builds(
        QuantConfig,
        platform=st.sampled_from(["venusa", "arcs", "venus"]),
        weight_bits=st.sampled_from([2, 4, 8]),
        activation_bits=st.just(8),
        output_bits=st.sampled_from([4, 8, 16]),
        granularity=st.sampled_from(["tensor", "channel"]),
        rounding=st.sampled_from([None, "stochastic", "half_even"]),
        range=RANGES,
        weight_range=WEIGHT_RANGES,
        gradient_bits=st.sampled_from([None, 4, 16]),
        gradient_range=st.sampled_from(["last_absmax", "ema_99%", 1.0]),
        narrow_weights=st.sampled_from([None, True]),
        strict_maximum=st.booleans(),
    ),
    freezes=st.booleans(),
)
def test_any_parts_are_exact_in_integers(config: QuantConfig, freezes: bool) -> None:
    torch.manual_seed(0)
    model, x = ResNet(), images(3)
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    linger.quantize(model, config)
    optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=0.01)
    for step in range(3):
        if freezes and step == 2:
            linger.freeze_ranges(model)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.eval()
    assert_integer_exact(model, x)
