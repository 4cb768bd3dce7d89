"""The error statistics: their formulas, and that nothing is read back while they are updated."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_linger.simulate.metrics import Divergence, OutputError, QuantError
from lightning_linger.simulate.samples import ValueSamples

STEP = 2.0**-4


class Readings(TorchDispatchMode):
    """Counts how often a value of a tensor is read, which on a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def values(shape: tuple[int, ...] = (4, 5, 6)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reference = torch.randn(shape)
    isolated = reference + 0.01 * torch.randn(shape)
    return (isolated / STEP).round().mul(STEP).clamp(-1.0, 1.0), reference, isolated


def test_nothing_is_read_back_while_a_batch_is_compared() -> None:
    fake, reference, isolated = values()
    step = torch.tensor(STEP)
    low, high = -8 * step, 7 * step
    meters = (QuantError(["a"]), Divergence(["a"]), OutputError(), ValueSamples(8))
    with Readings() as readings:
        meters[0].update("a", fake, reference, isolated, low, high, step)
        meters[1].update("a", step, fake, fake, isolated, reference, reference)
        meters[2].update(fake, reference)
        meters[3].add("a", reference, fake, low, high)
    assert readings.number == 0
    with readings:
        float(step)
    assert readings.number == 1, "a reading would have been seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_formulas(dtype: torch.dtype) -> None:
    batches = [tuple(x.to(dtype) for x in values()) for _ in range(2)]
    meter = QuantError(["a", "never seen"])
    for fake, reference, isolated in batches:
        meter.update("a", fake, reference, isolated, -1.0, 1.0, STEP)
    (row,) = meter.rows()
    fake, reference, isolated = (torch.cat(x).double() for x in zip(*batches, strict=True))

    def ratio(right: torch.Tensor) -> float:
        return float(10 * torch.log10(right.square().sum() / (fake - right).square().sum()))

    assert row.sqnr == pytest.approx(ratio(reference), abs=1e-2)
    assert row.isolated_sqnr == pytest.approx(ratio(isolated), abs=1e-2)
    cosine = torch.cosine_similarity(fake.flatten(), reference.flatten(), dim=0)
    assert row.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert row.saturation == (fake.abs() == 1.0).double().mean()
    assert row.exponent == -4.0


def test_a_grid_that_begins_at_zero_has_no_lower_end() -> None:
    meter = QuantError(["a"])
    fake = torch.tensor([0.0, 0.0, 0.5, 1.0])
    meter.update("a", fake, fake, fake, 0.0, 1.0, 0.5)
    (row,) = meter.rows()
    assert row.saturation == 0.25
    assert row.sqnr == 150.0
    assert row.cosine == 1.0


@pytest.mark.parametrize(
    ("shape", "class_dim", "decisions"),
    [((6, 4), 1, 6), ((2, 4, 3, 3), 1, 18), ((2, 5, 4), -1, 10), ((6,), 1, 0), ((6, 1), 1, 0)],
)
def test_decisions_are_counted_along_the_classes(
    shape: tuple[int, ...], class_dim: int, decisions: int
) -> None:
    right, ours = torch.randn(shape), torch.randn(shape)
    meter = OutputError(class_dim)
    meter.update(ours, right)
    row = meter.row()
    assert row is not None
    assert row.elements == right.numel()
    assert row.differing == 1.0
    assert row.decisions == decisions
    if decisions:
        changed = ours.argmax(class_dim) != right.argmax(class_dim)
        assert row.changed == changed.double().mean()
        assert row.changed > 0.0


def test_without_an_output_there_is_nothing_to_say() -> None:
    assert OutputError().row() is None
    meter = OutputError()
    meter.update(torch.empty(0, 4), torch.empty(0, 4))
    assert meter.row() is None


def test_samples_are_pairs_from_everywhere_and_touch_no_generator() -> None:
    reference = torch.arange(100_000, dtype=torch.float64).reshape(10, 100, 100)
    before = torch.get_rng_state()
    samples = ValueSamples(1000)
    samples.add("a", reference, -reference, -1.0, 1.0)
    assert torch.equal(before, torch.get_rng_state())
    sample = samples["a"]
    assert torch.equal(sample.quantized, -sample.reference)
    assert len(sample.reference.unique()) == 1000
    # Evenly: no tenth of the tensor has a tenth more or less than its share.
    counts = torch.histc(sample.reference, 10, 0, 100_000)
    assert counts.min() >= 90
    assert counts.max() <= 110
    # And in no column of an image more often than in another.
    columns = (sample.reference.long() % 100).bincount(minlength=100)
    assert columns.max() <= 20
    samples.add("a", reference[0, 0, :5], reference[0, 0, :5], -1.0, 1.0)
    assert sample is not samples["a"]
    assert len(samples["a"].reference) == 5
    assert "b" not in samples
