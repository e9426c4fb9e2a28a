"""Training loops without a framework: the bare one, which is the limit, and those around other packages' matchers."""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

from benchmarks.rounds import now
from benchmarks.workload import Workload
from fmlit.core.tensors import from_uint8
from fmlit.models.compilation import compile_net
from fmlit.models.unet import UNet


class Loop(ABC):
    """A training loop that goes on for a block of steps whenever it is asked to."""

    device: torch.device

    @abstractmethod
    def step(self) -> None:
        """One optimizer step, everything that belongs to it included."""

    def block(self, lead: int, steps: int) -> float:
        """Seconds of ``steps`` steps, after ``lead`` steps that are not timed."""
        for _ in range(lead):
            self.step()
        started = now(self.device)
        for _ in range(steps):
            self.step()
        return now(self.device) - started


class BareLoop(Loop):
    """A step of flow matching and nothing else, with fmlit's settings: fused AdamW, foreach EMA, data on the device.

    The recipe's memory format and mode of torch.compile are its own, too.
    No seeded draws, no logging, no check that the loss is finite. A subclass replaces ``loss`` alone.
    """

    def __init__(self, work: Workload) -> None:
        self.work, self.device = work, work.device
        self.net: UNet = copy.deepcopy(work.net).to(work.device).train()
        if work.compile:
            compile_net(self.net, work.compile)
        self.weights: list[Tensor] = list(self.net.parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=work.learning_rate, betas=work.betas, weight_decay=work.weight_decay, fused=True
        )
        self.averages = [[weight.detach().clone() for weight in self.weights] for _ in work.half_lives]
        self.images, self.labels = work.images.to(work.device), work.labels.to(work.device)
        self.images_seen = 0

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) in [-1, 1], and labels (B,) where the network takes them."""
        size, device = self.work.batch_size, self.device
        rows = torch.randint(len(self.images), (size,), device=device)
        z = from_uint8(self.images.index_select(0, rows))
        if self.work.flip:
            z = torch.where(torch.rand(size, 1, 1, 1, device=device) < 0.5, z.flip(-1), z)
        if not self.work.conditional:
            return z, None
        dropped = torch.rand(size, device=device) < self.work.label_drop
        return z, self.labels.index_select(0, rows).masked_fill(dropped, self.net.num_classes or 0)

    def loss(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Regression of the network on z - eps at (1 - t) eps + t z."""
        eps, t = torch.randn_like(z), torch.rand(len(z), device=self.device)
        return mse_loss(self.net(torch.lerp(eps, z, t[:, None, None, None]), t, labels), z - eps)

    def step(self) -> None:
        work = self.work
        with torch.autocast(self.device.type, torch.bfloat16, enabled=work.mixed):
            loss = self.loss(*self.batch())
        loss.backward()
        if work.clip:
            clip_grad_norm_(self.weights, work.clip)
        self.optimizer.param_groups[0]["lr"] = work.learning_rate * work.factor(self.images_seen + work.batch_size / 2)
        self.images_seen += work.batch_size
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, half_life in zip(self.averages, work.half_lives, strict=True):
                decay = 0.5 ** (work.batch_size / min(half_life, work.ramp * self.images_seen))
                torch._foreach_lerp_(average, self.weights, 1 - decay)


class TorchCFMLoop(BareLoop):
    """The bare loop with torchcfm's ``ConditionalFlowMatcher``."""

    def __init__(self, work: Workload) -> None:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        super().__init__(work)
        self.matcher = ConditionalFlowMatcher(sigma=0.0)

    def loss(self, z: Tensor, labels: Tensor | None) -> Tensor:
        t, x, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(z), z)
        return mse_loss(self.net(x, t, labels), velocity)


class FlowMatchingLoop(BareLoop):
    """The bare loop with flow_matching's ``CondOTProbPath``."""

    def __init__(self, work: Workload) -> None:
        from flow_matching.path import CondOTProbPath

        super().__init__(work)
        self.path = CondOTProbPath()

    def loss(self, z: Tensor, labels: Tensor | None) -> Tensor:
        t = torch.rand(len(z), device=self.device)
        sample = self.path.sample(t=t, x_0=torch.randn_like(z), x_1=z)
        return mse_loss(self.net(sample.x_t, t, labels), sample.dx_t)


class DiffusersLoop(BareLoop):
    """The bare loop with diffusers' ``DDPMScheduler``, which predicts noise."""

    def __init__(self, work: Workload) -> None:
        from diffusers import DDPMScheduler

        super().__init__(work)
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000)

    def loss(self, z: Tensor, labels: Tensor | None) -> Tensor:
        noise, steps = torch.randn_like(z), torch.randint(1000, (len(z),), device=self.device)
        x = self.scheduler.add_noise(z, noise, steps)
        return mse_loss(self.net.unet(x, steps, labels, return_dict=False)[0], noise)
