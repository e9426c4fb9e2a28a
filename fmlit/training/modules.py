"""The LightningModules: a ``GenerativeModel``, its optimizer, and one training step. The formulas are in ``flows``."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from fmlit.core import randomness
from fmlit.core.errors import UserError
from fmlit.data.data_module import DataModule
from fmlit.flows.couplings import IndependentCoupling, transport_cost
from fmlit.flows.loss_weights import LearnedLossWeight
from fmlit.flows.losses import prediction_loss
from fmlit.flows.paths import CondOTPath, GaussianPath, VPPath
from fmlit.flows.predictions import Noise, Prediction, Score, Velocity
from fmlit.flows.times import Limits, training_limits
from fmlit.models.compilation import CUDA_GRAPHS, Execution
from fmlit.models.generative_model import GenerativeModel
from fmlit.storage.descriptions import describe
from fmlit.training.draws import GlobalBatch, TrainingDraws
from fmlit.training.lightning_internals import attached_trainer, is_accumulating, restart_accumulation
from fmlit.training.networks import NetworkFactory, build_network, check_data
from fmlit.training.optimizers import AdamW, OptimizerConfig, match_state_strides, replace_saved_settings
from fmlit.training.run_context import RunContext
from fmlit.training.schedules import LearningRateSchedule


class GenerativeModule(pl.LightningModule, ABC):
    """Trains a ``GenerativeModel``. Subclasses choose the objective.

    Args:
        net: the network, or a function that builds it from ``(shape, num_classes)``, such as ``fmlit.UNet`` or
            ``functools.partial(fmlit.UNet, channels=64)``. On the command line, a class with its other arguments.
        shape: shape of one data point, such as (3, 32, 32). A network that is built already knows it. The command line
            takes it from the data.
        num_classes: number of classes of the data, or None. The command line takes it from the data.
        conditional: train a class-conditional model. A network that is built already decides by its ``num_classes``.
        path: the Gaussian path from noise to data.
        prediction: what the network predicts.
        draws: what a training step draws at random.
        optimizer: the optimizer and its settings.
        schedule: the course of the learning rate.
        learned_loss_weight: learn a weight of the loss over t along with the network; see ``LearnedLossWeight``.
        execution: memory format and compilation of the network.
        seed: seed of all training draws. The command line takes it from ``seed_everything``.

    Raises:
        UserError: the network, the shape and the classes do not fit together.
    """

    def __init__(
        self,
        net: NetworkFactory,
        shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        conditional: bool = False,
        path: GaussianPath = CondOTPath(),
        prediction: Prediction = Velocity(),
        draws: TrainingDraws = TrainingDraws(),
        optimizer: OptimizerConfig = AdamW(),
        schedule: LearningRateSchedule = LearningRateSchedule(),
        learned_loss_weight: bool = False,
        execution: Execution = Execution(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        network, shape, classes = build_network(net, shape, num_classes, conditional)
        coupled = not isinstance(draws.coupling, IndependentCoupling)
        self.model = GenerativeModel(network, path, prediction, shape, classes, coupled)
        self.loss_weight = LearnedLossWeight() if learned_loss_weight else None
        self.draws, self.optimizer, self.schedule, self.execution = draws, optimizer, schedule, execution
        execution.set_memory_format(network)
        self.seed, self.images_seen, self._ending = seed, 0, False
        self._stepped_at = 0  # images seen before the current optimizer step
        self._data_identity: dict[str, Any] | None = None
        self._run: RunContext | None = None

    @property
    def run(self) -> RunContext:
        """What this module and the callbacks of its run share: one for each Trainer that it is attached to."""
        trainer = attached_trainer(self)
        if self._run is None or self._run.trainer is not trainer:
            self._run = RunContext(self, trainer)
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}  # Lightning leaves the trainer out, too

    @abstractmethod
    def loss(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of each sample, (B,)."""

    def _regression(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None, weight: Tensor) -> Tensor:
        model = self.model
        return prediction_loss(lambda x, t: model(x, t, labels), model.prediction, model.path, z, eps, t, weight)

    @cached_property
    def time_limits(self) -> Limits:
        """The times at which the loss is finite."""
        return training_limits(self.model.path, self.model.prediction)

    def on_fit_start(self) -> None:
        self._ending, self._stepped_at = False, self.images_seen
        self.zero_grad()  # an earlier fit may have been interrupted between accumulated batches
        if self.execution.compile in CUDA_GRAPHS and self.trainer.accumulate_grad_batches > 1:
            # The next graph would write over gradients that are still being summed.
            conflict = f"{self.execution.compile} and trainer.accumulate_grad_batches do not go together"
            raise UserError(f"model.execution.compile: {conflict}; choose max-autotune-no-cudagraphs or default")
        if self.run.data is not None:
            check_data(self.model, self.run.data)
            self.name_classes(self.run.data)
            self._recognize(self.run.data)
        self.schedule.warn_of_long_warmup()
        self.execution.compile_net(self.model.net)
        if self.device.type == "cuda":
            # torch prefers cuDNN's attention on Hopper and Blackwell. Its backward pass in bfloat16 can return NaN, for
            # example with 64 positions, an 8x8 feature map: https://github.com/pytorch/pytorch/issues/196678
            torch.backends.cuda.enable_cudnn_sdp(False)

    def name_classes(self, data: DataModule) -> None:
        """Give the model the class names of its data, which travel with it into checkpoints and exports."""
        if self.model.num_classes is not None and data.class_names is not None:
            self.model.class_names = tuple(data.class_names)

    def _recognize(self, data: DataModule) -> None:
        """Warn if a resumed run sees other training data than before. Rank 0 compares, and keeps what it saw."""
        if not self.trainer.is_global_zero:
            return
        before, self._data_identity = self._data_identity, data.identity()
        if before is not None and before != self._data_identity:
            then, now = before.get("items"), self._data_identity["items"]
            change = f"{then} items then, {now} now" if then != now else f"{now} items as then, but other contents"
            rank_zero_warn(f"the training data have changed since this run was interrupted: {change}")

    def on_train_start(self) -> None:
        self.run.guard.to(self.device)
        self.run.guard.scaled = self._scaled
        for optimizer in self.trainer.optimizers:
            match_state_strides(optimizer)
        if self.trainer.world_size > 1 and self.run.data is not None:
            share, coupling = self.run.data.rank_slice().size, self.draws.coupling
            if not coupling.keeps_pairs(share):
                rank_zero_warn(
                    f"model.draws.coupling: {coupling} pairs other points on {self.trainer.world_size} processes, each "
                    f"with {share} of a batch, than on one; set across_ranks: true to keep the recipe"
                )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if not (isinstance(batch, dict) and batch.keys() >= {"data", "labels"}):
            wanted = "a dict of data (B, *shape) and labels (B,), as fmlit.DataModule deals"
            raise UserError(f"a batch must be {wanted}, got {type(batch).__name__}")
        z, labels = batch["data"], batch["labels"] if self.model.num_classes is not None else None
        drawn, t, labels = self._draw(len(z), labels)
        eps = self.draws.couple(self._global_batch(len(z)), z, drawn, labels)
        dropout = randomness.key(self.seed, self.images_seen, "dropout", self.global_rank)
        randomness.seed_layers(dropout, self.device)
        losses = self.loss(z, eps, t, labels)
        self.run.guard.note(losses.detach())
        self.images_seen += len(z) * self.trainer.world_size
        weighed = losses if self.loss_weight is None else self.loss_weight.weigh(losses, self.model.path, t)
        outputs = {"loss": weighed.mean(), "losses": losses.detach(), "times": t}
        if eps is not drawn:
            outputs["transport_cost"] = transport_cost(z, eps)
            outputs["transport_cost_independent"] = transport_cost(z, drawn)
        return outputs

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """An early end waits for the step whose gradient is being summed, or its images would be seen for nothing."""
        if is_accumulating(self.trainer):
            self._ending |= self.trainer.should_stop
            self.trainer.should_stop = False
        elif self._ending:
            self.trainer.should_stop = True

    def _draw(self, share: int, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's noise and times for the next batch, and its labels after dropping."""
        return self.draws.draw(self._global_batch(share), self.model, self.time_limits, labels)

    def _global_batch(self, share: int) -> GlobalBatch:
        """The next batch over all ranks, each with ``share`` rows."""
        return GlobalBatch(self.seed, self.images_seen, share, self.global_rank, self.trainer.world_size, self.device)

    def configure_optimizers(self) -> Optimizer:
        others = [] if self.loss_weight is None else [p for p in self.loss_weight.parameters() if p.requires_grad]
        # A gradient scaler and clipping do not go together with fused kernels.
        optimizer = self.optimizer.build(self.model.net, others, fused=not self._scaled)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        return optimizer

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Take the learning rate in the middle of the images of this step, so that the first step learns too."""
        factor = self.schedule.factor((self._stepped_at + self.images_seen) / 2)
        for group in optimizer.param_groups:
            if "peak_lr" in group:  # not an optimizer of the user's own
                group["lr"] = group["peak_lr"] * factor
        self._stepped_at = self.images_seen

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Not, as Lightning does, before the next backward pass: the forward pass before it can have their memory.
        optimizer.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: the gradients went after the last step."""

    @property
    def _scaled(self) -> bool:
        """Whether gradients are scaled, as float16 needs; the scaler then skips steps that are not finite."""
        plugin = getattr(attached_trainer(self), "precision_plugin", None)  # there may be no trainer yet
        return getattr(plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, and keep a gradient that is not finite away from the weights, on every rank.

        Not by ``clip_gradients``, which refuses fused optimizers in mixed precision: right where gradients are scaled.
        """
        if self._scaled:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        self.run.guard.admit(optimizer, self.images_seen, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"] = self.images_seen
        checkpoint["model_description"] = describe(self.model)
        checkpoint["optimizer"] = self.optimizer.kind
        if self.run.data is not None:
            checkpoint["data_description"] = describe(self.run.data)
            checkpoint["data_identity"] = self._data_identity
        if (averages := self.run.averages) is not None:
            # Not in the hook of that callback, which Lightning leaves out of checkpoints with save_weights_only.
            averages.update(self, self.global_step)
            checkpoint["ema"] = averages.averaged_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen, self._data_identity = checkpoint["images_seen"], checkpoint.get("data_identity")
        restart_accumulation(checkpoint, self.trainer.accumulate_grad_batches)
        checkpoint.get("callbacks", {}).pop(Timer.__name__, None)  # trainer.max_time is that of each launch
        if type(self).configure_optimizers is GenerativeModule.configure_optimizers:  # not a user's own
            if (saved := checkpoint["optimizer"]) != self.optimizer.kind:
                raise UserError(f"model.optimizer: the checkpoint was trained by {saved}, not {self.optimizer.kind}")
            replace_saved_settings(checkpoint, self.configure_optimizers())


class FlowMatchingModule(GenerativeModule):
    """Conditional flow matching: regression on the conditional velocity.

    A network that predicts something else is trained on that, with the weight that flow matching gives it, clipped
    (``Prediction.flow_matching_weight``).

    From Python, with any Trainer::

        data = fmlit.Digits()
        module = fmlit.FlowMatchingModule(net=fmlit.UNet((1, 8, 8), channels=32, multipliers=(1, 2), attention=()))
        lightning.Trainer(max_steps=500).fit(module, data)
    """

    def loss(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self._regression(z, eps, t, labels, self.model.prediction.flow_matching_weight(self.model.path, t))


class ScoreMatchingModule(GenerativeModule):
    """Denoising score matching: regression on the conditional score, weighted by beta^2.

    With ``prediction=Noise()``, the default, this is DDPM's noise regression. ``Score()`` trains a score network. A
    network that predicts something else is trained on that (``Prediction.score_matching_weight``).
    The other arguments are those of ``GenerativeModule``; the defaults of ``path`` and ``prediction`` differ.

    Args:
        weighted: weight the loss by beta^2. False trains on the course's plain ``|s_theta - s|^2``, to be compared:
            nearly all of it comes from times close to the data, where it grows like 1 / beta^2.
    """

    def __init__(
        self,
        *args: Any,
        path: GaussianPath = VPPath(),
        prediction: Prediction = Noise(),
        weighted: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, path=path, prediction=prediction, **kwargs)  # type: ignore[misc]  # path is not in args
        self.weighted = weighted

    def loss(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        weight = self.model.prediction.score_matching_weight(self.model.path, t, self.weighted)
        return self._regression(z, eps, t, labels, weight)

    @cached_property
    def time_limits(self) -> Limits:
        return training_limits(self.model.path, Score())  # a sampler needs the score, whatever is predicted
