"""Records of runs, made up for the tests."""

from typing import Any

from lightning_linger.dashboard.records import (
    EpochRecord,
    Layer,
    LayerError,
    OutputErrors,
    RunRecord,
    StageSwitch,
    ValueHistogram,
)

STEM, CONV, ADD, FC = "stem/conv2d/0", "block.conv/conv2d/0", "block/add/0", "fc/linear/0"


def layers() -> list[Layer]:
    """A stem, a residual block and a head."""
    return [
        Layer(STEM, "conv2d", "8/8/8", 8),
        Layer(CONV, "conv2d", "8/8/8", 8, inputs=(STEM,)),
        Layer(ADD, "add", "-/8/8", 8, inputs=(STEM, CONV)),
        Layer(FC, "linear", "8/8/8", 8, inputs=(ADD,)),
    ]


def good(site: str, **changed: Any) -> LayerError:
    """A layer with nothing wrong."""
    values: dict[str, Any] = {
        "sqnr": 36.0,
        "isolated_sqnr": 38.0,
        "cosine": 0.999,
        "saturation": 0.0,
        "exponent": -4.0,
        "mismatch_rate": 0.0,
        "max_lsb": 0,
    }
    return LayerError(site, **{**values, **changed})


def histogram(site: str) -> ValueHistogram:
    """Four bins, of which the last lies beyond the limit."""
    return ValueHistogram(
        site, (-2.0, -1.0, 0.0, 1.0, 2.0), (1, 5, 3, 1), (0, 6, 4, 0), low=-1.0, high=1.0
    )


def run(**changed: dict[str, object]) -> RunRecord:
    """A run of four epochs, quantized in the last two.

    Args:
        changed: Fields of a layer's error that are not good, by site.
    """
    errors = tuple(good(layer.site, **changed.get(layer.site, {})) for layer in layers())
    outputs = OutputErrors(30.0, 0.002, 0.0, 0.0)
    metrics = (
        {"val_accuracy": 0.5 + 0.1 * epoch, "train_loss": 1.0 / (1 + epoch)} for epoch in range(4)
    )
    stages = ((), ("fuse_bn", "normalize"), *(("fuse_bn", "normalize", "quantize"),) * 2)
    epochs = [
        EpochRecord(
            epoch,
            10 * (epoch + 1),
            on,
            values,
            errors if "quantize" in on else (),
            outputs if "quantize" in on else OutputErrors(),
        )
        for epoch, (on, values) in enumerate(zip(stages, metrics, strict=True))
    ]
    return RunRecord(
        "made-up",
        "venusa",
        settings={"quantize.weight_bits": "8"},
        layers=layers(),
        switches=[StageSwitch(e, 10 * e, on) for e, on in enumerate(stages[:3])],
        epochs=epochs,
        histograms={layer.site: histogram(layer.site) for layer in layers()},
    )
