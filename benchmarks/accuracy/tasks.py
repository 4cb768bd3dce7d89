"""What is learned: the networks and data of the examples, with splits and epochs of their own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# The examples import each other as Python does that runs one of them.
EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))

# They are found only behind the line above, so they cannot stand at the top (E402).
import attention  # noqa: E402
import common  # noqa: E402
import digits  # noqa: E402
import kws  # noqa: E402
import make_kws_features  # noqa: E402
import sequence  # noqa: E402

Labelled = tuple[Tensor, Tensor]
BATCH = 64


@dataclass(frozen=True)
class Task:
    """One network and its data.

    Args:
        name: Key of its results.
        title: What a table says about it.
        network: Builds the float network.
        data: Returns the training and the test data of a seed.
        last: Path of the layer that makes the logits.
        first: Path of the layer that reads the input, None where it is the network itself.
        epochs: Of the training in float that every recipe starts from.
        learning_rate: Of the training in float.
        tuning_epochs: Of every recipe, float included.
        tuning_rate: The learning rate of every recipe, float included.
        frozen_from: First epoch of QAT with few bits in which the statistics of batch norms and
            observed ranges stand still; None where they never do.
    """

    name: str
    title: str
    network: Callable[[], nn.Module]
    data: Callable[[int], tuple[Labelled, Labelled]]
    last: str
    first: str | None
    epochs: int
    learning_rate: float
    tuning_epochs: int
    tuning_rate: float
    frozen_from: int | None = None


def halves_of_digits(seed: int) -> tuple[Labelled, Labelled]:
    """Return two halves of scikit-learn's digits, drawn anew for each seed."""
    (left, left_labels), (right, right_labels) = common.digits_rows()
    rows, labels = torch.cat([left, right]), torch.cat([left_labels, right_labels])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split(2)
    return (rows[train], labels[train]), (rows[test], labels[test])


def halves_as_images(seed: int) -> tuple[Labelled, Labelled]:
    """Return the halves of the digits with a channel."""
    train, test = halves_of_digits(seed)
    return (train[0].unsqueeze(1), train[1]), (test[0].unsqueeze(1), test[1])


def spoken_words(seed: int) -> tuple[Labelled, Labelled]:
    """Return the spoken words: one split by voices, the same for every seed.

    What the example validates on is tested on too: no recipe chooses anything by it.
    """
    with np.load(make_kws_features.FEATURES, allow_pickle=False) as file:
        step, lowest = float(file["step"]), float(file["lowest"])

        def part(*splits: str) -> Labelled:
            codes = np.concatenate([file[f"{split}_codes"] for split in splits])
            labels = np.concatenate([file[f"{split}_labels"] for split in splits])
            features = torch.from_numpy(codes) * step + lowest
            return kws.as_image(features), torch.from_numpy(labels).long()

        return part("train"), part("test", "validation")


SPOKEN_WORDS = Task(
    "kws",
    "depthwise separable CNN on spoken words",
    lambda: kws.DSCNN(channels=32),
    spoken_words,
    last="fc",
    first="stem",
    epochs=12,
    learning_rate=8e-3,
    # Short epochs of a network without redundancy: few bits need as much training again.
    tuning_epochs=12,
    tuning_rate=8e-3,
    frozen_from=8,
)
SPOKEN_WORDS_LONG = dataclasses.replace(
    SPOKEN_WORDS,
    name="kws_long",
    title="depthwise separable CNN, tuned three times as long",
    tuning_epochs=36,
    frozen_from=24,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "digits",
            "residual CNN on digits",
            digits.Digits,
            halves_as_images,
            last="fc",
            first="stem",
            epochs=40,
            learning_rate=4e-3,
            tuning_epochs=20,
            tuning_rate=1e-3,
        ),
        Task(
            "sequence",
            "LSTM on rows of digits",
            sequence.RowReader,
            halves_of_digits,
            last="fc",
            first=None,
            epochs=60,
            learning_rate=1e-2,
            tuning_epochs=20,
            tuning_rate=2.5e-3,
        ),
        Task(
            "attention",
            "attention on rows of digits",
            attention.RowEncoder,
            halves_of_digits,
            last="fc",
            first="embed",
            epochs=60,
            learning_rate=4e-3,
            tuning_epochs=20,
            tuning_rate=1e-3,
        ),
        SPOKEN_WORDS,
        SPOKEN_WORDS_LONG,
    )
}
