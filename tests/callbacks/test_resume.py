"""A run that is resumed from a checkpoint ends with the bits of the uninterrupted run."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    NormalizeCallback,
    QuantizeCallback,
    RNGStateCallback,
)
from tests.callbacks.boring import Classifier, loader, trainer

EPOCHS = 4

# Earlier releases restart their loops differently inside an epoch, by themselves not exactly.
inside_epochs = pytest.mark.skipif(
    not hasattr(pl.loops.fit_loop._FitLoop, "is_resuming"), reason="needs Lightning 2.6"
)
lr = torch.optim.lr_scheduler
# Optimizer, and a function that asks the trainer for the number of steps, to scheduler.
SCHEDULERS: dict[str, Callable[[Any, Callable[[], int]], dict[str, Any]]] = {
    "constant": lambda o, _: {"scheduler": lr.ConstantLR(o, 1.0)},
    "lambda": lambda o, _: {"scheduler": lr.LambdaLR(o, [lambda e: 0.9**e] * 2)},
    "cosine": lambda o, n: {"scheduler": lr.CosineAnnealingLR(o, n()), "interval": "step"},
    "one cycle": lambda o, n: {"scheduler": lr.OneCycleLR(o, 0.02, n()), "interval": "step"},
    # A threshold that is never reached reduces the rate after every epoch.
    "plateau": lambda o, _: {
        "scheduler": lr.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
        "monitor": "val_loss",
    },
}


class Trained(Classifier):
    """Two parameter groups and a choice of optimizer and learning rate schedule."""

    def __init__(self, optimizer: str = "adamw", scheduler: str = "constant") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others}]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
        else:
            optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)

        def steps() -> int:
            return int(self.trainer.estimated_stepping_batches)

        scheduler = SCHEDULERS[self.scheduler](optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Learned(Trained):
    """Learned ranges in a group of their own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(linger.parameter_groups(self), lr=1e-2)


def learned_stages(kind: str) -> list[Any]:
    return [FuseBNCallback(), QuantizeCallback(at_epoch=1, range=kind, weight_range=kind)]


def chance_stages() -> list[Any]:
    return [FuseBNCallback(at_epoch=1), QuantizeCallback(at_epoch=2, rounding="stochastic")]


def stages() -> list[Any]:
    return [
        FuseBNCallback(at_epoch=1, freeze_at_epoch=3),
        NormalizeCallback(at_epoch=1, weight=8.0, bias="7*mean", output="99.9%"),
        QuantizeCallback(at_epoch=2),
    ]


def run(
    folder: Path,
    name: str,
    ckpt: Path | None = None,
    model: Callable[[], Any] = Trained,
    callbacks: Callable[[], list[Any]] = stages,
    data: Callable[[], Any] = loader,
    every_n_steps: int | None = None,
    exact: bool = True,
    **kwargs: Any,
) -> Path:
    """Train and return the folder with a checkpoint per epoch, and `final.ckpt`."""
    # A resumed run starts from other random numbers, and from other weights.
    seed = 11 if ckpt is None else 12
    pl.seed_everything(seed, verbose=False)
    saver = pl.callbacks.ModelCheckpoint(
        folder / name,
        filename="{step}" if every_n_steps else "{epoch}",
        save_top_k=-1,
        every_n_train_steps=every_n_steps,
    )
    extra = [RNGStateCallback()] if exact else []
    fit = trainer(
        folder, [*callbacks(), *extra, saver], EPOCHS, **{"enable_checkpointing": True, **kwargs}
    )
    fit.fit(model(), data(), loader(2, shuffle=False), ckpt_path=ckpt)
    fit.save_checkpoint(folder / name / "final.ckpt")
    return folder / name


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Name every entry of nested containers that differs in a bit."""
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            yield f"{path}: {found.keys() ^ expected.keys()}"
            return
        for key in expected:
            yield from differences(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            yield f"{path}: {len(found)} entries instead of {len(expected)}"
            return
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, f"{path}/{index}")
    elif isinstance(expected, Tensor):
        if not torch.equal(found, expected):
            yield path
    elif found != expected:
        yield f"{path}: {found} instead of {expected}"


STATES = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def unequal(found: Path, expected: Path) -> list[str]:
    one, other = read(found), read(expected)
    return [text for key in STATES for text in differences(one[key], other[key], key)]


MATRIX: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"model": lambda: Trained("sgd")},
    "lambda": {"model": lambda: Trained("sgd", "lambda")},
    "cosine": {"model": lambda: Trained("adamw", "cosine")},
    "one cycle": {"model": lambda: Trained("sgd", "one cycle")},
    "plateau": {"model": lambda: Trained("adamw", "plateau")},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "learned ranges": {"model": Learned, "callbacks": lambda: learned_stages("lsq")},
    "learned powers of two": {"model": Learned, "callbacks": lambda: learned_stages("tqt")},
    "rounding by chance": {"callbacks": chance_stages},
    "all": {
        "model": lambda: Trained("adamw", "one cycle"),
        "accumulate_grad_batches": 3,
        "precision": "bf16-mixed",
        "gradient_clip_val": 0.1,
    },
}


@pytest.mark.parametrize("options", MATRIX.values(), ids=MATRIX)
def test_every_epoch_boundary_resumes_to_the_same_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Before the first stage, between stages, and after the last."""
    whole = run(tmp_path, "whole", **options)
    for epoch in range(EPOCHS - 1):
        name = f"from-{epoch}"
        resumed = run(tmp_path, name, whole / f"epoch={epoch}.ckpt", **options)
        assert not unequal(resumed / "final.ckpt", whole / "final.ckpt"), name


def test_stages_did_something_in_these_runs(tmp_path: Path) -> None:
    staged = run(tmp_path, "staged")
    plain = run(tmp_path, "plain", callbacks=list)
    one, other = read(staged / "epoch=0.ckpt"), read(plain / "epoch=0.ckpt")
    assert torch.equal(one["state_dict"]["fc.weight"], other["state_dict"]["fc.weight"])
    one, other = read(staged / "epoch=1.ckpt"), read(plain / "epoch=1.ckpt")
    assert not torch.equal(one["state_dict"]["fc.weight"], other["state_dict"]["fc.weight"])


def test_without_the_callback_shuffling_and_dropout_differ(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", exact=False)
    resumed = run(tmp_path, "resumed", whole / "epoch=0.ckpt", exact=False)
    assert unequal(resumed / "final.ckpt", whole / "final.ckpt")


def test_a_plateau_step_is_not_lost(tmp_path: Path) -> None:
    """What Lightning alone does: the rate of the resumed run is one reduction behind."""
    options = {"model": lambda: Trained("adamw", "plateau")}
    rates = {}
    for exact in (True, False):
        whole = run(tmp_path, f"whole-{exact}", exact=exact, **options)
        resumed = run(tmp_path, f"resumed-{exact}", whole / "epoch=1.ckpt", exact=exact, **options)
        rates[exact] = [
            read(path / "final.ckpt")["optimizer_states"][0]["param_groups"][0]["lr"]
            for path in (whole, resumed)
        ]
    assert rates[True][0] == rates[True][1]
    assert rates[False][1] == 2 * rates[False][0]


@inside_epochs
def test_checkpoints_of_the_end_of_a_validation_resume_exactly(tmp_path: Path) -> None:
    """Lightning calls `on_train_epoch_end` of that epoch again."""

    class Saver(pl.callbacks.Checkpoint):
        """Lightning calls what derives from `Checkpoint` last."""

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"validated-{trainer.current_epoch}.ckpt")

    options = {"model": lambda: Trained("sgd", "plateau")}
    whole = run(tmp_path, "whole", callbacks=lambda: [*stages(), Saver()], **options)
    for epoch in range(EPOCHS - 1):
        checkpoint = tmp_path / f"validated-{epoch}.ckpt"
        resumed = run(tmp_path, f"resumed-{epoch}", checkpoint, **options)
        assert not unequal(resumed / "final.ckpt", whole / "final.ckpt"), epoch


def ours(path: Path) -> dict[str, Tensor]:
    return {k: v for k, v in read(path)["state_dict"].items() if k.startswith("_linger.")}


class Freezer(pl.Callback):
    """Notes the state a resumed run starts with."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        state = pl_module.state_dict()
        self.state = {k: v.clone() for k, v in state.items() if k.startswith("_linger.")}


@pytest.mark.parametrize("step", [2, 4, 7, 8, 10])
def test_the_middle_of_an_epoch_keeps_stages_and_scales(tmp_path: Path, step: int) -> None:
    whole = run(tmp_path, "whole", every_n_steps=1)
    start = Freezer()
    checkpoint = whole / f"step={step}.ckpt"
    run(tmp_path, "resumed", checkpoint, callbacks=lambda: [*stages(), start])
    assert start.state.keys() == ours(checkpoint).keys()
    assert not list(differences(start.state, ours(checkpoint)))


class Resumable:
    """A loader that shuffles by epoch and can go on in the middle of one."""

    def __init__(self, batches: int = 3) -> None:
        self.batches = list(loader(batches, shuffle=False))
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = random.Random(self.epoch).sample(range(len(self.batches)), len(self.batches))
        while self.position < len(order):
            self.position += 1
            yield self.batches[order[self.position - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


@inside_epochs
def test_with_a_resumable_loader_any_step_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", data=lambda: Resumable(4), every_n_steps=1)
    for step in (1, 5, 7, 10, 13):
        checkpoint = whole / f"step={step}.ckpt"
        resumed = run(tmp_path, f"from-{step}", checkpoint, data=lambda: Resumable(4))
        assert not unequal(resumed / "final.ckpt", whole / "final.ckpt"), step


def test_finding_the_sites_leaves_a_resumable_loader_where_it_was(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", data=lambda: Resumable(3), every_n_steps=1)
    assert read(whole / "final.ckpt")["global_step"] == 3 * EPOCHS
    assert read(whole / "step=1.ckpt")["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [
        {"epoch": 0, "position": 1}
    ]


def test_every_random_generator_is_carried(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    class Drawing(Trained):
        def on_train_epoch_end(self) -> None:
            drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))

    whole = run(tmp_path, "whole", model=Drawing)
    expected, drawn = drawn, []
    run(tmp_path, "resumed", whole / "epoch=1.ckpt", model=Drawing)
    assert drawn == expected[2:]


def test_a_gaussian_that_is_drawn_ahead_is_carried() -> None:
    """Numpy and Python draw normal numbers in pairs and keep the second."""
    from lightning_linger.callbacks.rng_state import random_state, set_random_state

    random.gauss(0, 1)
    np.random.randn()
    state = random_state()
    expected = random.gauss(0, 1), np.random.randn(), torch.rand(3)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    set_random_state(state)
    assert (random.gauss(0, 1), np.random.randn()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_a_run_with_more_processes_than_the_checkpoint_says_so(tmp_path: Path) -> None:
    checkpoint = run(tmp_path, "whole") / "epoch=1.ckpt"
    content = read(checkpoint)
    content["callbacks"]["LingerRNGState"]["ranks"] = []
    torch.save(content, checkpoint)
    with pytest.warns(UserWarning, match="written by 0 processes; rank 0"):
        run(tmp_path, "resumed", checkpoint)
