"""From a model on paper to an image for the chip in five stages: a ResNet on 32x32 pixels.

1. check: can the target run the model? Nothing is trained yet.
2. float training, its second half with limits on weights and outputs
3. quantization-aware training, on the integer grid of the target
4. pack: the exported model as the image that a chip loads
5. verify: the file against the model of the checkpoint, element by element

The images are scikit-learn's digits, enlarged; `--data` takes a folder of CIFAR-10 in its binary
version (`data_batch_1.bin` ...).

Run with `python examples/resnet.py`. Needs `pip install "lightning-linger[examples]"`, and for the
fourth stage the packer in an environment of its own: `make thinker-env`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Classifier, Results, TensorData, digits_rows, parser_of, run
from rich.console import Console
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.export.packer import pack

SIZE = 32
CLASSES = 10
CIFAR_TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
CIFAR_TEST = "test_batch.bin"
CIFAR_RECORD = 1 + 3 * SIZE * SIZE  # a label and three planes of bytes
TESTED = 500  # images; the integers of each are compared one by one
PACKER = Path(__file__).parents[1] / ".venv-thinker" / "bin" / "tpacker"


class Block(nn.Module):
    """Two convolutions with a shortcut, which is a convolution where the sizes change.

    The usual one has a kernel of 1x1 also with a stride of 2; the check says that the engines have
    no stride beyond the kernel.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, stride, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(Classifier):
    """The ResNet-8 of small devices; nothing in it knows about quantization."""

    def __init__(self, width: int = 8, learning_rate: float = 3e-3) -> None:
        super().__init__(learning_rate)
        # One image: that is what the chip computes at a time.
        self.example_input_array = torch.zeros(1, 3, SIZE, SIZE)
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# --- data ---------------------------------------------------------------------------------------


def digits_data(limit: int | None = None) -> TensorData:
    """Digits of 32x32 pixels in three equal channels."""
    parts = []
    for rows, labels in digits_rows():
        images = F.interpolate(rows.unsqueeze(1), size=SIZE, mode="bilinear") - 0.5
        parts.append((images.expand(-1, 3, -1, -1).contiguous(), labels))
    return TensorData(*parts, limit=limit)


def cifar_data(folder: Path, limit: int | None = None) -> TensorData:
    """CIFAR-10 in its binary version, and some of its test images."""
    missing = [name for name in (*CIFAR_TRAIN, CIFAR_TEST) if not (folder / name).is_file()]
    if missing:
        msg = (
            f"{folder} lacks {', '.join(missing)}. Pass the folder of CIFAR-10's binary version; "
            "the one for Python holds pickles, which are not loaded."
        )
        raise SystemExit(msg)
    parts = [_read_cifar(folder / name) for name in CIFAR_TRAIN]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    test = tuple(tensor[:TESTED] for tensor in _read_cifar(folder / CIFAR_TEST))
    return TensorData((images, labels), test, limit=limit)


def _read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % CIFAR_RECORD:
        msg = f"{path} is no file of CIFAR-10: its records have {CIFAR_RECORD} bytes."
        raise SystemExit(msg)
    records = torch.from_numpy(content.reshape(-1, CIFAR_RECORD))
    images = records[:, 1:].reshape(-1, 3, SIZE, SIZE).float() / 255.0 - 0.5
    return images, records[:, 0].long()


# --- the stages ---------------------------------------------------------------------------------


def main(
    out: Path,
    epochs: int,
    platform: str = "venusa",
    data: Path | None = None,
    limit: int | None = None,
    width: int = 8,
    packer: Path = PACKER,
) -> Results:
    """Walk through the stages for one target and print what came of each."""
    console = Console()
    console.rule("1. check")
    findings = linger.check(ResNet(width), platform, (torch.zeros(1, 3, SIZE, SIZE),))
    print(findings if findings else f"Nothing stands against {platform}.")
    if not findings.deployable:
        msg = "The model cannot be deployed as it is."
        raise SystemExit(msg)

    console.rule("2. float training, 3. quantization-aware training")
    images = digits_data(limit) if data is None else cifar_data(data, limit)
    name = f"resnet.{platform}.onnx"
    title = f"ResNet, {len(images.test)} test images"
    results = run(title, lambda: ResNet(width), images, {platform: name}, out, "resnet", epochs)[
        platform
    ]

    console.rule("4. pack")
    exported = out / name
    if platform == "onnxruntime":
        console.print("onnxruntime runs the file as it is.")
    elif packer.is_file():
        packed = pack(exported, out / f"resnet.{platform}.pkg", packer)
        console.print(f"{packed.path}: {packed.path.stat().st_size} bytes for {packed.platform}")
    else:
        console.print(f"There is no packer at {packer}: `make thinker-env` installs it.")

    console.rule("5. verify")
    model = linger.load_checkpoint(ResNet, out / f"resnet.{platform}.ckpt", width=width)
    samples = {"x": images.test.tensors[0].numpy()}
    verdict = linger.verify(model, exported, samples, (model.example_input_array,))
    console.print(str(verdict))
    return {**results, "verified": float(verdict.equal)}


if __name__ == "__main__":
    parser = parser_of(__doc__, "runs/resnet", 8, ["venusa"])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's binary version")
    parser.add_argument("--width", type=int, default=8, help="channels of the first layers")
    arguments = parser.parse_args()
    for target in arguments.platform:
        main(
            arguments.out,
            arguments.epochs,
            target,
            arguments.data,
            arguments.limit,
            arguments.width,
        )
