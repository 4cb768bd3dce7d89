"""The example keeps what its table promises."""

from pathlib import Path

import pytest
import torch

import lightning_linger as linger
from examples import digits

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime")

ACCURACIES = ("float", "constrained", "QAT", "integer", "exported")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_digits_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = digits.main(tmp_path, epochs=3)
    assert set(results) == {"venusa", "onnxruntime"}
    for platform, result in results.items():
        for name in ACCURACIES:
            assert 0.0 < result[name] <= 1.0, f"{platform}: {name}"
        assert result["QAT"] > 0.9, platform
        assert result["integer_vs_exported"] == 0
        assert result["integer"] == result["exported"]
    # Power-of-two scales agree bit for bit; free scales up to rounding ties.
    assert results["venusa"]["fake_vs_integer"] == 0
    assert results["venusa"]["QAT"] == results["venusa"]["integer"]
    assert results["onnxruntime"]["fake_vs_integer"] < 0.02 * 4500

    for name in ("digits.linger.onnx", "digits.qdq.onnx"):
        assert (tmp_path / name).stat().st_size > 0
    for platform in results:
        events = list((tmp_path / "tensorboard" / platform).glob("events.out.tfevents.*"))
        assert len(events) == 1
        state = torch.load(tmp_path / f"digits.{platform}.ckpt", weights_only=False)["state_dict"]
        assert any(key.startswith("_linger.") for key in state)
    printed = capsys.readouterr().out
    assert "logits that differ" in printed
    assert "tensorboard --logdir" in printed


def test_the_example_model_is_quantized_completely() -> None:
    model = digits.Digits()
    linger.prepare(model, (torch.rand(2, 1, 8, 8),))
    linger.fuse_bn(model)
    linger.quantize(model)
    model.train()(torch.rand(8, 1, 8, 8))
    assert not [row for row in linger.summary(model) if row.system == "float"]
