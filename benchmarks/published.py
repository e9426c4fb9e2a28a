"""Training loops as other packages' own examples set them up: network, optimizer, precision, averages, data loading.

Written here around the installed packages, with the settings of the published examples; only the batch size is common
to all. Pictures are read as those examples read them, one by one through Pillow and torchvision in worker processes.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

from benchmarks.loops import Loop
from benchmarks.workload import Workload


class Pictures(Dataset[tuple[Any, int]]):
    """Pillow pictures one by one, transformed, with their labels: as torchvision's CIFAR10 deals them."""

    def __init__(self, work: Workload, transform: Callable[[Any], Any]) -> None:
        self.arrays = work.images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels = work.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def torchcfm_loader(work: Workload) -> DataLoader:
    """Of its CIFAR-10 example: 4 workers, float32 in [-1, 1]."""
    from torchvision import transforms

    steps = [*_flip(work), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    pictures = Pictures(work, transforms.Compose(steps))
    return DataLoader(pictures, work.batch_size, shuffle=True, num_workers=4, drop_last=True)


def flow_matching_loader(work: Workload) -> DataLoader:
    """Of its image example: 10 workers, pinned memory, float32 in [0, 1]."""
    from torchvision.transforms import v2

    steps = [v2.ToImage(), *_flip(work), v2.ToDtype(torch.float32, scale=True)]
    pinned = work.device.type == "cuda"
    pictures = Pictures(work, v2.Compose(steps))
    return DataLoader(pictures, work.batch_size, shuffle=True, num_workers=10, drop_last=True, pin_memory=pinned)


def diffusers_loader(work: Workload) -> DataLoader:
    """Of its unconditional example: no workers; resized and cropped to the size that they have."""
    from torchvision import transforms

    size = work.images.shape[-1]
    fitted = [transforms.Resize(size), transforms.CenterCrop(size)]
    steps = [*fitted, *_flip(work), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    return DataLoader(Pictures(work, transforms.Compose(steps)), work.batch_size, shuffle=True)


def _flip(work: Workload) -> list[Any]:
    from torchvision import transforms

    return [transforms.RandomHorizontalFlip()] if work.flip else []


def fresh_batches(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches for ever, from new workers, without those that they fetch ahead before anyone asks."""
    batches = chain.from_iterable(repeat(loader))
    for _ in range(loader.num_workers * (loader.prefetch_factor or 0)):
        next(batches)
    return batches


class PublishedLoop(Loop):
    """A loop fed by a data loader, whose workers live as long as a block: between blocks they would disturb others."""

    loader: DataLoader
    cudnn_benchmark = False

    def __init__(self, work: Workload) -> None:
        self.work, self.device = work, work.device
        self._batches: Iterator[Any] = iter(())

    def block(self, lead: int, steps: int) -> float:
        self._batches = fresh_batches(self.loader)
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, self.cudnn_benchmark
        try:
            return super().block(lead, steps)
        finally:
            self._batches = iter(())
            torch.backends.cudnn.benchmark = before

    def load_in_process(self) -> None:
        """Read pictures without worker processes, where time does not matter: workers take seconds to start."""
        if self.loader.num_workers:
            size = self.loader.batch_size
            self.loader = DataLoader(self.loader.dataset, size, shuffle=True, drop_last=True)

    def next_batch(self) -> tuple[Tensor, Tensor | None]:
        """Images and labels on the device, labels only for a network that takes them."""
        images, labels = next(self._batches)
        labels = labels.to(self.device, non_blocking=True) if self.work.conditional else None
        return images.to(self.device, non_blocking=True), labels

    def _copy_of_net(self) -> Any:
        return copy.deepcopy(self.work.net).to(self.device).to(memory_format=torch.contiguous_format).train()


class PublishedTorchCFM(PublishedLoop):
    """torchcfm's CIFAR-10 example: its U-Net, float32, Adam, warm-up over 5,000 steps, clipping at 1, EMA of 0.9999."""

    def __init__(self, work: Workload) -> None:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        super().__init__(work)
        self.loader = torchcfm_loader(work)
        self.net = own_unet(work).to(self.device).train()
        self.average = copy.deepcopy(self.net)
        self.matcher = ConditionalFlowMatcher(sigma=0.0)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=2e-4)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(step, 5000) / 5000)

    def step(self) -> None:
        self.optimizer.zero_grad()
        z, labels = self.next_batch()
        t, x, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(z), z)
        loss = torch.mean((self.net(t, x, labels) - velocity) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        source, target = self.net.state_dict(), self.average.state_dict()
        for name, value in source.items():
            target[name].copy_(target[name] * 0.9999 + value * (1 - 0.9999))


def own_unet(work: Workload) -> nn.Module:
    """torchcfm's U-Net with the widths of ours; on CIFAR-10 that of its example, parameter for parameter."""
    from torchcfm.models.unet.unet import UNetModelWrapper

    net = work.net
    return UNetModelWrapper(
        dim=net.shape,
        num_res_blocks=net.blocks,
        num_channels=net.channels,
        channel_mult=list(net.multipliers),
        num_heads=4,
        num_head_channels=net.head_channels,
        attention_resolutions=",".join(map(str, net.attention)),
        dropout=net.dropout,
        class_cond=work.conditional,
        num_classes=None if net.num_classes is None else net.num_classes + 1,
    )


class PublishedFlowMatching(PublishedLoop):
    """flow_matching's image example: AdamW, float16 with scaled gradients on a GPU, skewed times, EMA of up to 0.9999.

    The loss is read at every step, as there. Its U-Net is not part of the package: ours takes its place.
    """

    cudnn_benchmark = True

    def __init__(self, work: Workload) -> None:
        from flow_matching.path import CondOTProbPath
        from torchmetrics.aggregation import MeanMetric

        super().__init__(work)
        self.loader = flow_matching_loader(work)
        self.net = self._copy_of_net()
        self.average = [weight.detach().clone() for weight in self.net.parameters()]
        self.updates = torch.tensor(0, device=self.device)
        self.path = CondOTProbPath()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.95))
        self.on_gpu = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.on_gpu)
        self.means = [MeanMetric().to(self.device) for _ in range(2)]  # of the batch, of the epoch

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.means[0].reset()
        z, labels = self.next_batch()
        z = z * 2.0 - 1.0
        t = torch.sigmoid(1.2 - 1.2 * torch.randn(len(z), device=self.device)).clamp(min=1e-4)
        sample = self.path.sample(t=t, x_0=torch.randn_like(z), x_1=z)
        with torch.autocast("cuda", enabled=self.on_gpu):
            loss = torch.pow(self.net(sample.x_t, t, labels) - sample.dx_t, 2).mean()
        loss.item()
        for mean in self.means:
            mean.update(loss)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.stack([weight.grad.norm() for weight in self.net.parameters()]).norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        count = self.updates.item()
        decay = min(0.9999, (1 + count) / (10 + count))
        with torch.no_grad():
            for average, weight in zip(self.average, self.net.parameters(), strict=True):
                average.sub_((1 - decay) * (average - weight))


class PublishedDiffusers(PublishedLoop):
    """diffusers' unconditional example, on accelerate: noise regression, AdamW, cosine decay, clipping at 1, EMA.

    The example's U-Net for 64x64 images is replaced by ours, which is of its class.
    """

    def __init__(self, work: Workload) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        super().__init__(work)
        unet = self._copy_of_net().unet
        self.noising: Any = DDPMScheduler(num_train_timesteps=1000)
        parameters = unet.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        decay = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        self.average.to(self.device)
        # Everything is on the device already, which need not be the one that it would choose.
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no", device_placement=False)
        prepared = self.accelerator.prepare(unet, optimizer, diffusers_loader(work), decay)
        self.unet, self.optimizer, self.loader, self.decay = prepared

    def step(self) -> None:
        z, labels = self.next_batch()
        noise = torch.randn(z.shape, device=self.device)
        steps = torch.randint(0, 1000, (len(z),), device=self.device)
        x = self.noising.add_noise(z, noise, steps)
        with self.accelerator.accumulate(self.unet):
            loss = mse_loss(self.unet(x, steps, labels).sample, noise)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.decay.step()
            self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())
        loss.detach().item()
