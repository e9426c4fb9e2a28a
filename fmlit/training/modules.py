"""The LightningModules: a ``GenerativeModel``, its optimiser, and one training step. The formulas are in floor 1."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from fmlit.core import randomness
from fmlit.core.errors import UserError
from fmlit.flows.couplings import Coupling, IndependentCoupling, transport_cost
from fmlit.flows.loss_weights import LearnedLossWeight
from fmlit.flows.losses import flow_matching_loss, score_matching_loss
from fmlit.flows.paths import CondOTPath, GaussianPath, VPPath
from fmlit.flows.predictions import Noise, Prediction, Score, Velocity
from fmlit.flows.times import Limits, TimeDistribution, UniformTime, training_limits
from fmlit.models.compilation import CUDA_GRAPHS, CompileMode, compile_net
from fmlit.models.generative_model import GenerativeModel
from fmlit.storage.descriptions import describe
from fmlit.training.lightning_internals import attached_trainer, is_accumulating
from fmlit.training.optimizers import MuonAdamW, match_state_strides, reconfigure
from fmlit.training.run_context import RunContext
from fmlit.training.schedules import Decay, RateSchedule

NetworkFactory = Callable[[Sequence[int], int | None], nn.Module]


class GenerativeModule(pl.LightningModule, ABC):
    """Trains a ``GenerativeModel``; subclasses choose the objective.

    Every draw of a step (times, noise, dropped labels) is made for the global batch from generators keyed by
    ``(seed, images_seen, stream)``, and each rank takes its slice: nothing is saved, and no two ranks share noise.

    Args:
        net: builds the network from ``(shape, num_classes)``: a class with its other arguments.
        shape: shape of one data point; the command line takes it from the data.
        num_classes: classes of the data, or None; the command line takes it from the data.
        conditional: train a class-conditional model.
        path: the Gaussian path from noise to data.
        prediction: what the network predicts.
        time_distribution: the law of training times.
        coupling: how data and noise are paired within a batch.
        label_drop: probability with which a sample's label is replaced by the null label.
        images: run length in training images; the decay ends there.
        learning_rate: of the optimiser, AdamW, after warm-up.
        warmup_images: images over which the learning rate rises linearly from 0.
        stable_images: images after warm-up before it decays.
        decay: the learning rate from then on: "constant", "linear" or "cosine" to 0 at ``images``.
        betas: AdamW's.
        weight_decay: AdamW's and Muon's.
        muon: train hidden matrices and kernels by Muon, the rest by AdamW, at the same learning rate.
        learned_loss_weight: learn a weight of the loss over t along with the network; see ``LearnedLossWeight``.
        channels_last: keep kernels and activations in the channels-last format, which suits GPUs.
        compile: mode of ``torch.compile`` for the network; null runs it plainly.
        seed: of all training draws; the command line takes it from ``seed_everything``.
    """

    def __init__(
        self,
        net: NetworkFactory,
        shape: Sequence[int],
        num_classes: int | None = None,
        conditional: bool = False,
        path: GaussianPath = CondOTPath(),
        prediction: Prediction = Velocity(),
        time_distribution: TimeDistribution = UniformTime(),
        coupling: Coupling = IndependentCoupling(),
        label_drop: float = 0.1,
        images: int = 1_000_000,
        learning_rate: float = 2e-4,
        warmup_images: int = 0,
        stable_images: int = 0,
        decay: Decay = "constant",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        muon: bool = False,
        learned_loss_weight: bool = False,
        channels_last: bool = False,
        compile: CompileMode | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if conditional and num_classes is None:
            raise UserError("conditional: true needs data with classes, and this data has none")
        if not 0 <= label_drop <= 1:
            raise UserError(f"label_drop must be a probability in [0, 1], got {label_drop}")
        if not learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {learning_rate}")
        self.schedule = RateSchedule(images, warmup_images, stable_images, decay)
        classes = num_classes if conditional else None
        coupled = not isinstance(coupling, IndependentCoupling)
        self.model = GenerativeModel(net(tuple(shape), classes), path, prediction, shape, classes, coupled)
        self.time_distribution, self.coupling, self.label_drop = time_distribution, coupling, label_drop
        self.loss_weight = LearnedLossWeight() if learned_loss_weight else None
        if channels_last:
            if any(p.ndim == 5 for p in self.model.net.parameters()):
                raise UserError("channels_last is of images, and this network has kernels of three dimensions")
            self.model.net.to(memory_format=torch.channels_last)
        self.channels_last = channels_last
        self.muon, self.compile_mode = muon, compile
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.seed = seed
        self.images_seen = 0
        self._ending = False
        self._run: RunContext | None = None

    @property
    def run(self) -> RunContext:
        """What this module and the callbacks of its run share: one for each Trainer that it is attached to."""
        if self._run is None or self._run.trainer is not attached_trainer(self):
            self._run = RunContext(self)
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}  # Lightning leaves the trainer out, too

    @abstractmethod
    def loss(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of each sample, (B,)."""

    @cached_property
    def time_limits(self) -> Limits:
        """The times at which the loss is finite."""
        return training_limits(self.model.path, self.model.prediction)

    def on_fit_start(self) -> None:
        self._ending = False
        self.zero_grad()  # an earlier fit may have been interrupted between accumulated batches
        if self.compile_mode in CUDA_GRAPHS and self.trainer.accumulate_grad_batches > 1:
            raise UserError(  # the next graph would write over gradients that are still being summed
                f"model.compile: {self.compile_mode} and trainer.accumulate_grad_batches do not go together; choose "
                f"max-autotune-no-cudagraphs or default"
            )
        if self.compile_mode:
            compile_net(self.model.net, self.compile_mode)

    def on_train_start(self) -> None:
        self.run.guard.to(self.device)
        self.run.guard.scaled = self._scaled
        for optimizer in self.trainer.optimizers:
            match_state_strides(optimizer)
        if self.trainer.world_size > 1 and self.run.data is not None:
            share = self.run.data.rank_slice().size
            if not self.coupling.keeps_pairs(share):
                rank_zero_warn(
                    f"model.coupling: {self.coupling} pairs other points on {self.trainer.world_size} processes, each "
                    f"with {share} of a batch, than on one; set across_ranks: true to keep the recipe"
                )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        z, labels = batch["data"], batch["labels"] if self.model.num_classes is not None else None
        drawn, t, labels = self._draw(len(z), labels)
        eps = self._couple(z, drawn, labels)
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

    def _draw(self, size: int, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's slice of the global batch's noise, times, and labels after dropping."""
        total = size * self.trainer.world_size
        mine = self._slice(size)

        def generator(stream: str) -> torch.Generator:
            return randomness.training_generator(self.seed, self.images_seen, stream, self.device)

        eps = torch.randn(total, *self.model.shape, generator=generator("noise"), device=self.device)[mine]
        t = self.time_distribution.sample(total, generator("time"), self.time_limits)[mine]
        if labels is not None and self.label_drop > 0:
            dropped = torch.rand(total, generator=generator("labels"), device=self.device)[mine] < self.label_drop
            labels = torch.where(dropped, self.model.null_label, labels)  # type: ignore[arg-type]  # there are classes
        return eps, t, labels

    def _couple(self, z: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        """This rank's slice of the noise, paired with its data."""
        if not self.coupling.across_ranks or self.trainer.world_size == 1:
            return self.coupling(z, eps, labels)

        def everywhere(x: Tensor) -> Tensor:
            parts = [torch.empty_like(x) for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather(parts, x.contiguous())
            return torch.cat(parts)

        coupled = self.coupling(everywhere(z), everywhere(eps), None if labels is None else everywhere(labels))
        return coupled[self._slice(len(z))]

    def _slice(self, size: int) -> slice:
        """Which rows of a global micro-batch are this rank's."""
        return slice(self.global_rank * size, (self.global_rank + 1) * size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "weight_decay": self.weight_decay}
        settings["fused"] = not self._scaled  # a gradient scaler and clipping do not go together with it
        others = [] if self.loss_weight is None else [p for p in self.loss_weight.parameters() if p.requires_grad]
        optimizer: Optimizer
        if self.muon:
            optimizer = MuonAdamW(self.model.net, others=others, **settings)
        else:
            optimizer = torch.optim.AdamW([*self.model.net.parameters(), *others], **settings)
        # Keyed by images, not by steps: the recipe stays the same when the batch size changes.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self.schedule.factor(self.images_seen))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
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
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and keep a gradient that is not finite away from the weights, on every rank.

        Not by ``clip_gradients``, which refuses fused optimisers in mixed precision: right where gradients are scaled.
        """
        if self._scaled:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        self.run.guard.admit(optimizer, self.images_seen, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"] = self.images_seen
        checkpoint["model_description"] = describe(self.model)
        if self.run.data is not None:
            checkpoint["data_description"] = describe(self.run.data)
        if (averages := self.run.averages) is not None:
            # Not in the hook of that callback, which Lightning leaves out of checkpoints with save_weights_only.
            averages.update(self, self.global_step)
            checkpoint["ema"] = averages.averaged_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["images_seen"]
        checkpoint.get("callbacks", {}).pop(Timer.__name__, None)  # trainer.max_time is that of each launch
        if type(self).configure_optimizers is GenerativeModule.configure_optimizers:  # not a user's own
            rates = self.learning_rate, self.schedule.factor(self.images_seen)
            reconfigure(checkpoint, *rates, betas=self.betas, weight_decay=self.weight_decay)
        # What was saved of a network wrapped by torch.compile.
        for state in (checkpoint["state_dict"], *checkpoint.get("ema", {}).values()):
            for name in [name for name in state if "_orig_mod." in name]:
                state[name.replace("_orig_mod.", "")] = state.pop(name)


class FlowMatchingModule(GenerativeModule):
    """Conditional flow matching: regression on the conditional velocity, whatever the network predicts."""

    def loss(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        model = self.model
        weight = model.prediction.loss_weight(model.path, t)
        return flow_matching_loss(lambda x, t: model.velocity(x, t, labels), model.path, z, eps, t, weight)


class ScoreMatchingModule(GenerativeModule):
    """Denoising score matching: regression on the conditional score, weighted by beta^2.

    With ``prediction=Noise()``, the default, this is DDPM's noise regression; with ``Score()`` a score network.
    """

    def __init__(
        self, *args: Any, path: GaussianPath = VPPath(), prediction: Prediction = Noise(), **kwargs: Any
    ) -> None:
        super().__init__(*args, path=path, prediction=prediction, **kwargs)  # type: ignore[misc]  # path is not in args

    def loss(self, z: Tensor, eps: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        model = self.model
        return score_matching_loss(lambda x, t: model.score(x, t, labels), model.path, z, eps, t)

    @cached_property
    def time_limits(self) -> Limits:
        return training_limits(self.model.path, Score())  # the loss passes through the score, whatever is predicted
