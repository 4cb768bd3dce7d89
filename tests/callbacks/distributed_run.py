"""Trains in two processes and writes what came out: run by `test_distributed.py`.

Lightning starts the second process, which runs this file again. Every scenario returns plain data
of its rank; each rank writes one JSON file.
"""

import dataclasses
import hashlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_linger as linger
from lightning_linger.callbacks import (
    AdaRoundCallback,
    BiasCorrectionCallback,
    DistillationCallback,
    EqualizeCallback,
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    ONNXExportCallback,
    ProgressiveBitsCallback,
    QuantErrorCallback,
    QuantizeCallback,
    ReestimateBNCallback,
    RNGStateCallback,
    SensitivityCallback,
)
from lightning_linger.core.distributed import mean_over_ranks
from lightning_linger.core.instrumentation import STATE_PREFIX, instrumentation_of
from lightning_linger.core.ranges import RangeEstimator
from lightning_linger.core.recipe import decode, encode
from lightning_linger.simulate.metrics import Divergence, OutputError
from lightning_linger.stages.checkpoints import RECIPE_KEY
from lightning_linger.stages.learned import learned_ranges
from tests.callbacks.boring import CLASSES, Classifier, trainer

RANKS = 2
BATCHES = 4


class Plain(Classifier):
    """Without batch norm and dropout, so that two processes compute what one does."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.bn = nn.Identity()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Learned(Classifier):
    """Ranges are parameters."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(linger.parameter_groups(self), lr=1e-2)


class Unused(Classifier):
    """Has a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Sharded(Classifier):
    """Its layers are sharded in `configure_model`, a folded one together with its batch norm."""

    units = (("stem", "bn"), ("conv",), ("fc",))

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for unit in self.units:
            if not isinstance(getattr(self, unit[0]), FSDPModule):
                fully_shard([getattr(self, name) for name in unit], mesh=mesh)
        if not isinstance(self, FSDPModule):
            fully_shard(self, mesh=mesh)


class ShardedApart(Sharded):
    """A batch norm is sharded apart from the layer before it."""

    units = (("stem",), ("bn",), ("conv",), ("fc",))


def data(batch_size: int) -> DataLoader[Any]:
    """Images of which every second one is much larger; Lightning shuffles them over the ranks."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCHES * RANKS * 4, 1, 6, 6, generator=generator)
    images[1::2] *= 9.5
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size)


def interleaved() -> DataLoader[Any]:
    """Batches of which rank 0 and 1 together have the samples of `data(4 * RANKS)`."""
    dataset = data(4).dataset
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return DataLoader(dataset, 4, sampler=DistributedSampler(dataset, RANKS, rank, shuffle=False))


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return sha.hexdigest()


def ours(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k.startswith(STATE_PREFIX)}


def ranges(module: nn.Module) -> dict[str, list[float]]:
    return {k: v.tolist() for k, v in ours(module).items() if k.endswith((".range", "_bound"))}


class Digests(pl.Callback):
    """Notes weights and ranges after every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append((digest(dict(pl_module.named_parameters())), digest(ours(pl_module))))


def stages(at_epoch: int = 0, **limits: Any) -> list[Any]:
    return [
        FuseBNCallback(at_epoch=at_epoch),
        NormalizeCallback(at_epoch=at_epoch, **limits),
        QuantizeCallback(at_epoch=at_epoch),
    ]


def fit(
    folder: Path,
    callbacks: list[Any],
    model: type[Classifier] = Classifier,
    strategy: Any = "ddp",
    epochs: int = 2,
    ckpt: Path | None = None,
    seed: int = 5,
    loader: DataLoader[Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Classifier]:
    pl.seed_everything(seed, verbose=False)
    module = model()
    options = {"devices": RANKS, "strategy": strategy, "num_sanity_val_steps": 0, **kwargs}
    run = trainer(folder, callbacks, epochs, **options)
    run.fit(module, loader or data(4), data(4), ckpt_path=ckpt)
    return run, module


def agreement(strategy: Callable[[], Any], model: Any = Classifier, **kwargs: Any) -> Any:
    def scenario(folder: Path) -> dict[str, Any]:
        seen = Digests()
        limits = {"weight": "9*mean", "output": "99%"}
        _, module = fit(folder, [*stages(1, **limits), seen], model, strategy(), epochs=3, **kwargs)
        return {"digests": seen.seen, "ranges": ranges(module)}

    return scenario


def learned(at_epoch: int, strategy: str) -> Callable[[Path], Any]:
    def scenario(folder: Path) -> dict[str, Any]:
        seen = Digests()
        quantize = QuantizeCallback(at_epoch=at_epoch, range="lsq", weight_range="lsq")
        _, module = fit(folder, [FuseBNCallback(), quantize, seen], Learned, strategy, epochs=3)
        values = {name: x.tolist() for name, x in module.named_parameters() if "_linger" in name}
        return {"digests": seen.seen, "learned": values}

    return scenario


def ddp(**options: Any) -> Callable[[], Any]:
    return lambda: pl.strategies.DDPStrategy(process_group_backend="gloo", **options)


def global_batch(folder: Path) -> dict[str, Any]:
    _, module = fit(folder, [QuantizeCallback()], Plain, epochs=1, loader=interleaved())
    weights = {name: x.tolist() for name, x in module.named_parameters()}
    return {"ranges": ranges(module), "weights": weights}


def dynamic_limits(folder: Path) -> dict[str, Any]:
    limits = NormalizeCallback(weight=None, output="2*mean")
    options = {"epochs": 1, "limit_train_batches": 1, "loader": interleaved()}
    _, module = fit(folder, [limits], Plain, **options)
    return {"ranges": ranges(module)}


def estimators(_: Path) -> dict[str, Any]:
    """Ranges of batches that only one rank has, with and without values that are not finite."""
    me = dist.get_rank()
    found = {}
    for kind in ("ema_absmax", "minmax", "absmax", "mean_minmax", "ema_three_sigma", "50%", "kl"):
        estimator = RangeEstimator(kind, "site")
        batches = [
            torch.tensor([-1.0, 2.0 + 7 * me]),
            torch.tensor([float("nan") if me else 3.0, -40.0]),
            torch.tensor([-float("inf") if me else 3.0, -40.0]),
            torch.empty(0) if me else torch.tensor([-12.0]),
            torch.empty(0),
        ]
        for batch in batches:
            estimator.observe(batch)
        found[kind] = [*estimator.range.tolist(), estimator.batches.item()]
    return found


def means(_: Path) -> dict[str, Any]:
    """Means of unlike numbers of values, and of none on rank zero."""
    me = dist.get_rank()
    values = torch.tensor(1.0 + 3 * me)
    counts = {"unlike": 1 + 2 * me, "one empty": 5 * me, "empty": 0}
    return {name: mean_over_ranks(values, count).item() for name, count in counts.items()}


def learned_by_chance(folder: Path) -> dict[str, Any]:
    """Learned ranges from the second epoch on, and rounding by chance."""
    seen = Digests()
    quantize = QuantizeCallback(at_epoch=1, range="tqt", weight_range="lsq", rounding="stochastic")
    strategy = ddp(find_unused_parameters=True)()
    _, module = fit(folder, [FuseBNCallback(), quantize, seen], strategy=strategy)
    found = {name: x.tolist() for name, x in learned_ranges(module).items()}
    return {"digests": seen.seen, "learned": found}


def narrowing(folder: Path) -> dict[str, Any]:
    """Chosen widths, then narrower ones, drawn to the float model, on data that ranks divide."""
    seen = Digests()
    chooser = SensitivityCallback(at_epoch=1, budget=400, apply=True)
    progressive = ProgressiveBitsCallback({2: {"activation_bits": 6, "output_bits": 6}})
    callbacks = [*stages(1), chooser, progressive, DistillationCallback(), seen]
    _, module = fit(folder, callbacks, epochs=3)
    bits = [row.bits for row in linger.summary(module)]
    return {"digests": seen.seen, "rows": [vars(row) for row in chooser.rows], "bits": bits}


def metrics(folder: Path) -> dict[str, Any]:
    validator, error = IntegerValidatorCallback(batches=2), QuantErrorCallback()
    saver = pl.callbacks.ModelCheckpoint(folder / "best", monitor="quant_error/worst_sqnr")
    callbacks = [*stages(), validator, error, saver]
    run, _ = fit(folder, callbacks, Plain, enable_checkpointing=True)
    return {
        "divergence": [(row.site, row.elements, row.mismatches) for row in validator.latest],
        "error": [(row.site, row.sqnr, row.cosine) for row in error.latest],
        "logged": {k: float(v) for k, v in run.callback_metrics.items() if "/" in k},
        "best": saver.best_model_path,
    }


def without_data(_: Path) -> dict[str, Any]:
    """Only rank 1 has seen values; rank zero, which would warn, has not."""
    outputs, divergence = OutputError(), Divergence(["site"])
    if dist.get_rank():
        values = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
        outputs.update(values, values.flip(0))
        divergence.update("site", 1.0, values, values + 1, values, values, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row, (site,) = outputs.row(), divergence.rows()
    return {"outputs": dataclasses.asdict(row) if row else None, "max_lsb": site.max_lsb}


def export(folder: Path) -> dict[str, Any]:
    class Writers(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.there = (folder / "model.onnx").exists()

    end, each = (
        ONNXExportCallback(folder / "model.onnx"),
        ONNXExportCallback(folder / "{epoch}.onnx", at_epoch=[0, 1]),
    )
    after = Writers()
    fit(folder, [*stages(), end, each, after])
    return {
        "written": [path.name for path in (*each.exported, *end.exported)],
        "mismatches": end.mismatches,
        "there": after.there,
    }


def resume(folder: Path) -> dict[str, Any]:
    def run(name: str, ckpt: Path | None = None, seed: int = 5) -> dict[str, Tensor]:
        saver = pl.callbacks.ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)
        callbacks = [*stages(1), RNGStateCallback(), saver]
        # The order of the data comes from this seed, which has to be the same again.
        _, module = fit(
            folder, callbacks, epochs=3, ckpt=ckpt, seed=seed, enable_checkpointing=True
        )
        return module.state_dict()

    whole = run("whole")
    dist.barrier()
    from_ = {e: run(f"from-{e}", folder / "whole" / f"epoch={e}.ckpt") for e in (0, 1)}
    return {
        str(epoch): [key for key in whole if not torch.equal(whole[key], state[key])]
        for epoch, state in from_.items()
    }


def parallel(in_pieces: bool = False, tensors: int = 1) -> Any:
    return pl.strategies.ModelParallelStrategy(
        data_parallel_size=RANKS // tensors,
        tensor_parallel_size=tensors,
        save_distributed_checkpoint=in_pieces,
    )


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and ranges, gathered where they are sharded."""
    state = module.state_dict()
    state[RECIPE_KEY] = encode(decode(state[RECIPE_KEY]), {})  # without blanks at its end
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def sharded(folder: Path) -> dict[str, Any]:
    """Sharded training is that of DDP, also when it is resumed, and its file a plain model's."""

    def run(
        name: str, strategy: Any, model: type[Classifier] = Sharded, ckpt: Path | None = None
    ) -> tuple[Any, Classifier]:
        saver = pl.callbacks.ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)
        validators = [IntegerValidatorCallback(batches=1), QuantErrorCallback()]
        quantize = QuantizeCallback(at_epoch=1, freeze_at_epoch=2)
        others = [RNGStateCallback(), *validators, saver]
        callbacks = [FuseBNCallback(), NormalizeCallback(), quantize, *others]
        options = {"strategy": strategy, "epochs": 4, "ckpt": ckpt, "enable_checkpointing": True}
        return fit(folder, callbacks, model, **options)

    wanted = whole(run("ddp", "ddp", Classifier)[1])
    found = {}
    for in_pieces in (False, True):
        kind = "pieces" if in_pieces else "file"
        _, module = run(kind, parallel(in_pieces))
        found[kind] = whole(module)
        for epoch in (0, 1, 2):
            name, ckpt = f"{kind} from {epoch}", folder / kind / f"epoch={epoch}.ckpt"
            found[name] = whole(run(name, parallel(in_pieces), ckpt=ckpt)[1])
    loaded = linger.load_checkpoint(Classifier, folder / "file" / "epoch=3.ckpt")
    found["loaded"] = whole(loaded)
    return {
        name: [key for key in wanted if not torch.equal(wanted[key], state[key])]
        for name, state in found.items()
    }


def condition(folder: Path) -> dict[str, Any]:
    """A condition that holds on rank 0 first."""
    on: list[bool] = []

    class Spy(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            on.append(instrumentation_of(pl_module).switches.quantize)

    def when(trainer: Any, module: Any) -> bool:
        return trainer.current_epoch >= 1 + trainer.global_rank

    fit(folder, [QuantizeCallback(when=when), Spy()], epochs=3)
    return {"on": on}


def algorithms(folder: Path) -> dict[str, Any]:
    """Each process looks at its own half of the data."""
    results: dict[str, Any] = {}
    for last in (AdaRoundCallback(steps=20, learning_rate=0.1), BiasCorrectionCallback()):
        callbacks = [
            *(FuseBNCallback(), EqualizeCallback(at_epoch=1)),
            *(QuantizeCallback(at_epoch=1, weight_bits=3), ReestimateBNCallback(), last),
        ]
        _, module = fit(folder, callbacks, loader=interleaved())
        applied = instrumentation_of(module).applied
        results[last.name] = {"state": digest(module.state_dict()), "applied": list(applied)}
    return results


def message(folder: Path, callbacks: list[Any] | None = None, **options: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test reads the message
        fit(folder, stages() if callbacks is None else callbacks, **options)
    return str(caught.value)


def refused(folder: Path) -> dict[str, Any]:
    learned = QuantizeCallback(range="tqt")
    export = ONNXExportCallback(folder / "model.onnx")
    return {
        "sync_batchnorm": message(folder, sync_batchnorm=True),
        "sharded apart": message(folder, strategy=parallel(), model=ShardedApart),
        "learned": message(folder, [learned], strategy=parallel(), model=Sharded),
        "export": message(folder, [*stages(), export], strategy=parallel(), model=Sharded),
        "algorithm": message(
            folder, [*stages(), ReestimateBNCallback()], strategy=parallel(), model=Sharded
        ),
        "tensor parallel": message(folder, strategy=parallel(tensors=RANKS), model=Sharded),
    }


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "ddp": agreement(lambda: "ddp"),
    "accumulation": agreement(lambda: "ddp", accumulate_grad_batches=2),
    "static graph": agreement(ddp(static_graph=True, gradient_as_bucket_view=True)),
    "find unused": agreement(ddp(find_unused_parameters=True), Unused),
    "no broadcast": agreement(ddp(broadcast_buffers=False), Plain),
    "learned": learned(0, "ddp"),
    "learned later": learned(1, "ddp_find_unused_parameters_true"),
    "global batch": global_batch,
    "dynamic limits": dynamic_limits,
    "estimators": estimators,
    "means": means,
    "learned by chance": learned_by_chance,
    "narrowing": narrowing,
    "metrics": metrics,
    "without data": without_data,
    "export": export,
    "resume": resume,
    "sharded": sharded,
    "algorithms": algorithms,
    "condition": condition,
    "refused": refused,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        place = folder / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        try:
            results[name] = scenario(place)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
        print(name, flush=True)
    rank = dist.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
