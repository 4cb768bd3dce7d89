"""Every Python block in the README and the documentation runs as printed, page by page."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_linger as linger
from lightning_linger.core.registry import all_ops, unregister
from lightning_linger.export.extension import unregister_export

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


class YourModel(pl.LightningModule):
    """What the README calls yours: it knows nothing about quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class YourData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
        return DataLoader(TensorDataset(images, labels), batch_size=4)

    val_dataloader = train_dataloader


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, each moved down to its own line, so that errors point at it."""
    text = page.read_text()
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in BLOCK.finditer(text)]


def run(page: Path, namespace: dict[str, Any]) -> None:
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and forget the ops that a page has registered."""
    monkeypatch.chdir(tmp_path)
    before = {op.kind for op in all_ops()}
    yield
    for kind in {op.kind for op in all_ops()} - before:
        unregister(kind)
        unregister_export(kind)


@pytest.mark.filterwarnings("ignore")
def test_readme_runs_as_printed(tmp_path: Path) -> None:
    model = YourModel()
    namespace: dict[str, Any] = {"model": model, "datamodule": YourData()}
    assert len(blocks(ROOT / "README.md")) == 1
    run(ROOT / "README.md", namespace)
    trainer = namespace["trainer"]
    assert trainer.current_epoch == trainer.max_epochs
    assert trainer.callback_metrics["integer/mismatches"] == 0
    assert (tmp_path / "model.onnx").exists()
    assert {row.system for row in linger.summary(model)} == {"fake", "folded", "merged"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documentation_runs_as_printed(page: Path) -> None:
    # `Net` and `batches`, which every page may use, are defined at the top of the quick start.
    namespace: dict[str, Any] = {}
    exec(blocks(ROOT / "docs" / "quickstart.md")[0], namespace)
    run(page, namespace)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_counts_the_vectors_right() -> None:
    vectors = list((ROOT / "tests" / "data" / "golden" / "thinker").glob("*.npz"))
    assert f"{len(vectors)} test vectors" in (ROOT / "README.md").read_text()
