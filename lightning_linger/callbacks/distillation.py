"""Distillation from the model's own float function during quantization-aware training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.calibrate import CalibrateCallback
from lightning_linger.callbacks.quantize import QuantizeCallback
from lightning_linger.callbacks.schedule import Schedule, require_reached
from lightning_linger.callbacks.strategies import shards
from lightning_linger.core.calls import ModuleCall
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import STATE_PREFIX, instrumentation_of, is_prepared
from lightning_linger.core.logs import logger
from lightning_linger.core.modes import kept_modes
from lightning_linger.simulate.divergence import main_result
from lightning_linger.simulate.integer import number_system

Teacher = Literal["frozen", "live"]
Loss = Literal["kl", "mse"]


class DistillationCallback(Callback):
    """Adds a loss that draws the quantized model's output to that of its float teacher.

    The teacher is the model itself, in evaluation mode and without quantization: with a copy of the
    weights from before quantization started, or with those of the moment. In a training step it
    repeats the calls of the model, with their inputs, and the last output is compared. The term is
    added to the loss right before backward, scaled and divided as Lightning has scaled and divided
    the loss for mixed precision and accumulation; the user's module and what it logs stay as they
    are. ``distillation_loss`` is logged.

    It acts in the epochs in which quantization is on. A checkpoint holds the copy of the weights
    from then on, without which a run could not be resumed to the same bits; the live teacher
    needs none.

    List it after `QuantizeCallback`. With manual optimization it is refused, as a step may have any
    number of losses there.

    Args:
        weight: Of the term, beside the loss of ``training_step``.
        temperature: Divides the logits of both; the divergence is multiplied with its square, so
            that gradients keep their size (Hinton et al., 2015, section 2). Only for ``kl``.
        loss: ``kl``, the Kullback-Leibler divergence of the decisions from those of the teacher, in
            nats per decision, or ``mse``, the mean squared difference of the outputs.
        teacher: ``frozen`` or ``live``.
        class_dim: Dimension of the classes, for ``kl``.
        at_epoch: First epoch with the term; None begins with quantization.
        end_epoch: First epoch without it again.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        loss: Loss = "kl",
        teacher: Teacher = "frozen",
        class_dim: int = 1,
        at_epoch: int | None = None,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not isinstance(value, int | float) or not 0.0 < value < math.inf:
                msg = f"`{name}` must be a positive number. Found: {value!r}."
                raise ConfigError(msg)
        for name, choice, allowed in (
            ("loss", loss, ("kl", "mse")),
            ("teacher", teacher, ("frozen", "live")),
        ):
            if choice not in allowed:
                msg = f"`{name}` must be one of {allowed}. Found: {choice!r}."
                raise ConfigError(msg)
        self.schedule = Schedule(at_epoch, end_epoch=end_epoch)
        self.weight = weight
        self.temperature = temperature
        self.loss = loss
        self.teacher = teacher
        self.class_dim = class_dim
        self._weights: dict[str, Tensor] = {}

    # --- the run ----------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a run in which there would be nothing to distill, or too late."""
        if stage != "fit":
            return
        if shards(trainer):
            msg = (
                "DistillationCallback is not supported by ModelParallelStrategy: the teacher's "
                "weights would have to be gathered for every step. HINT: use `strategy='ddp'`."
            )
            raise misconfiguration(msg)
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        found = [callback for callback in before if isinstance(callback, QuantizeCallback)]
        if not found or isinstance(found[0], CalibrateCallback):
            msg = (
                "DistillationCallback follows no QuantizeCallback: there is no quantized model to "
                "draw to the float one. HINT: list it after a QuantizeCallback."
            )
            raise misconfiguration(msg)
        self._refuse_a_schedule_without_epochs(trainer, found[0].schedule.at_epoch or 0)

    def _refuse_a_schedule_without_epochs(self, trainer: Any, quantized_at: int) -> None:
        first, end = self.schedule.at_epoch, self.schedule.end_epoch
        require_reached(trainer, first, f"DistillationCallback(at_epoch={first})")
        if end is not None and end <= quantized_at and not trainer.fast_dev_run:
            msg = (
                f"DistillationCallback(end_epoch={end}) ends before quantization starts in epoch "
                f"{quantized_at}, and would never act. HINT: leave `end_epoch` away."
            )
            raise misconfiguration(msg)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what the term cannot be added to; forget the teacher of another run."""
        if not pl_module.automatic_optimization:
            msg = (
                "DistillationCallback adds a term to the loss of `training_step`; with manual "
                "optimization a step may have any number of losses. HINT: use automatic "
                "optimization, or add the term in `training_step`."
            )
            raise misconfiguration(msg)
        quantized = is_prepared(pl_module) and instrumentation_of(pl_module).switches.quantize
        kept = self._weights if quantized else {}
        self._weights = {name: x.to(pl_module.device) for name, x in kept.items()}

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin to note what the model is called with, and what it returns."""
        if not is_prepared(pl_module) or not instrumentation_of(pl_module).switches.quantize:
            return
        # However late the term begins: from here on weights are those of the quantized model.
        if self.teacher == "frozen" and not self._weights:
            self._keep_weights(trainer, pl_module)
        if self.schedule.is_on(trainer, pl_module, False):
            instrumentation_of(pl_module).exchanges = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Add the term to the loss, which Lightning has made for this backward alone."""
        exchanges = instrumentation_of(pl_module).exchanges
        if not exchanges:
            return
        with _teaching(pl_module), trainer.precision_plugin.train_step_context():
            wanted = self._taught(pl_module, exchanges)
        term = self._term(main_result(exchanges[-1][1]), main_result(wanted))
        # Another closure of the same step, as LBFGS calls it, begins anew.
        exchanges.clear()
        pl_module.log("distillation_loss", term.detach())
        share = term * (self.weight / trainer.accumulate_grad_batches)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            share = scaler.scale(share)
        loss.add_(share.to(loss.dtype))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop noting."""
        if is_prepared(pl_module):
            instrumentation_of(pl_module).exchanges = None

    # --- the teacher ------------------------------------------------------------------------

    def _keep_weights(self, trainer: Any, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        # Without a reduction every rank has running statistics of its own.
        buffers = trainer.strategy.broadcast(dict(module.named_buffers()))
        self._weights = {
            name: tensor.detach().clone()
            for name, tensor in {**parameters, **buffers}.items()
            if not name.startswith(STATE_PREFIX)
        }
        logger.info("distillation keeps the weights of epoch %d", trainer.current_epoch)

    @torch.no_grad()
    def _taught(self, module: nn.Module, exchanges: list[tuple[ModuleCall, Any]]) -> Any:
        """Repeat the calls as the teacher makes them; what one returns goes into the next."""
        taught: dict[int, Any] = {}
        paths = {id(part): path for path, part in module.named_modules()}
        result: Any = None
        for call, student in exchanges:
            args, kwargs = tree_map_only(
                Tensor, lambda x: _for_teacher(x, taught), (call.args, call.kwargs)
            )
            result = self._called(call.module, paths[id(call.module)], args, kwargs)
            taught.update((id(ours), theirs) for ours, theirs in _pairs(student, result))
        return result

    def _called(self, part: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        if self.teacher == "live":
            return part(*args, **kwargs)
        prefix = f"{path}." if path else ""
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in self._weights.items()
            if name.startswith(prefix)
        }
        return functional_call(part, weights, args, kwargs)

    def _term(self, student: Tensor | None, teacher: Tensor | None) -> Tensor:
        if student is None or teacher is None:
            msg = (
                "The model returns no floating tensor to distill. HINT: return one, e.g. logits, "
                "from the `forward` that `training_step` calls last."
            )
            raise misconfiguration(msg)
        if student.shape != teacher.shape:
            msg = (
                f"In training the model returns a tensor of shape {tuple(student.shape)}, in "
                f"evaluation, as the teacher does, one of shape {tuple(teacher.shape)}. HINT: let "
                "the first tensor that `forward` returns be the same in both."
            )
            raise misconfiguration(msg)
        student, teacher = student.float(), teacher.float()
        if self.loss == "mse":
            return F.mse_loss(student, teacher)
        if not -student.dim() <= self.class_dim < student.dim() or student.dim() < 2:
            msg = (
                f"An output of shape {tuple(student.shape)} has no classes along dimension "
                f"{self.class_dim}. HINT: pass `class_dim`, or use loss='mse'."
            )
            raise misconfiguration(msg)
        ours = (student / self.temperature).log_softmax(self.class_dim)
        right = (teacher / self.temperature).log_softmax(self.class_dim)
        divergence = F.kl_div(ours, right, reduction="sum", log_target=True)
        decisions = student.numel() // student.shape[self.class_dim]
        return divergence * (self.temperature**2 / max(decisions, 1))

    # --- checkpoints ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's weights, once they are kept."""
        return {"weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the teacher of the checkpoint."""
        self._weights = state_dict["weights"]


def _pairs(student: Any, teacher: Any) -> list[tuple[Any, Any]]:
    """Return what the student has returned, each with what the teacher returns in its place."""
    ours, theirs = tree_leaves(student), tree_leaves(teacher)
    if len(ours) != len(theirs):
        # Evaluation leaves auxiliary outputs out.
        return [(main_result(student), main_result(teacher))]
    return list(zip(ours, theirs, strict=True))


def _for_teacher(x: Tensor, taught: dict[int, Any]) -> Tensor:
    if id(x) in taught:
        found: Tensor = taught[id(x)]
        return found
    if x.requires_grad and not x.is_leaf:
        msg = (
            "`training_step` computes what it gives to the model from what the model has returned, "
            "which a teacher cannot repeat. HINT: let one `forward` do it, and call `self(...)`."
        )
        raise misconfiguration(msg)
    return x


@contextlib.contextmanager
def _teaching(module: nn.Module) -> Iterator[None]:
    """Run in evaluation mode and in float, unseen by what notes calls."""
    instrumentation = instrumentation_of(module)
    noted = instrumentation.calls, instrumentation.exchanges
    instrumentation.calls = instrumentation.exchanges = None
    try:
        with kept_modes(module):
            for part in module.modules():
                part.training = False
            with number_system(module, "float"):
                yield
    finally:
        instrumentation.calls, instrumentation.exchanges = noted
