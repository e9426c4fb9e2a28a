"""``GenerativeModel``: a network together with the meaning of its output. The noun that samplers and scripts take."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.core.tensors import check_like
from fmlit.flows.paths import GaussianPath
from fmlit.flows.predictions import Prediction


class GenerativeModel(nn.Module):
    """A network, the path that it was trained on, and what it predicts; gives every field that a sampler may follow.

    Args:
        net: ``net(x, t, labels)``, see ``networks.py``.
        path: the Gaussian path.
        prediction: what the network's output means.
        shape: shape of one data point, e.g. (3, 32, 32).
        num_classes: number of classes, or None for an unconditional model. The null label is ``num_classes``.
        coupled: it was trained on paired noise and data (see ``couplings.py``). Its velocity and what it makes of z and
            eps hold as ever, but p_t(x | z) is no longer N(alpha z, beta^2 I), and ``score`` is not that of p_t.

    Fields take x (B, *shape), t (B,) and labels int64 (B,), or None for "unconditional", and return (B, *shape).
    """

    def __init__(
        self,
        net: nn.Module,
        path: GaussianPath,
        prediction: Prediction,
        shape: Sequence[int],
        num_classes: int | None = None,
        coupled: bool = False,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise UserError(f"num_classes must be at least 1, or None for an unconditional model, got {num_classes}")
        if getattr(net, "num_classes", num_classes) != num_classes:
            raise UserError(
                f"{type(net).__name__} has num_classes={net.num_classes}, the model {num_classes}: make them equal"
            )
        self.net, self.path, self.prediction = net, path, prediction
        self.shape, self.num_classes, self.coupled = tuple(shape), num_classes, coupled
        self.dtype: torch.dtype | None = None  # of the network's arithmetic; None leaves it to whoever calls

    @property
    def null_label(self) -> int | None:
        """The label that stands for "unconditional"; None where there are no classes."""
        return self.num_classes

    @property
    def device(self) -> torch.device:
        weights = itertools.chain(self.net.parameters(), self.net.buffers())
        return next((w.device for w in weights), torch.device("cpu"))  # a field in closed form may have none

    def with_net(self, net: nn.Module) -> "GenerativeModel":
        """The same model around another network, e.g. an averaged copy. Nothing is copied."""
        return GenerativeModel(net, self.path, self.prediction, self.shape, self.num_classes, self.coupled)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's own output at x."""
        if labels is None and self.num_classes is not None:
            labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
        elif labels is not None and self.num_classes is None:
            raise UserError("labels were given to an unconditional model; pass labels=None")
        # Expanded times are no other case for a compiled network.
        inputs = self.prediction.network_input(self.path, x, t), t.contiguous(), labels
        if self.dtype is None:
            output = self.net(*inputs)
        else:
            with torch.autocast(x.device.type, self.dtype):
                output = self.net(*inputs).to(x.dtype)
        check_like(output, x, f"the output of {type(self.net).__name__} and x")
        return output

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The marginal velocity u_t(x)."""
        return self.prediction.velocity(self.path, self(x, t, labels), x, t)

    def score(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The marginal score grad log p_t(x); of a ``coupled`` model ``-E[eps | x] / beta``, which is no score."""
        return self.prediction.score(self.path, self(x, t, labels), x, t)

    def noise(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[eps | x_t = x]."""
        return self.prediction.noise(self.path, self(x, t, labels), x, t)

    def data(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[z | x_t = x]: the denoised x."""
        return self.prediction.data(self.path, self(x, t, labels), x, t)


@contextmanager
def evaluation_mode(model: GenerativeModel, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode for every part of the network; each is put back as it was (a frozen part may differ).

    With ``dtype`` the network computes in it by autocast; what goes in and comes out stays as it is.
    """
    modes, before = {module: module.training for module in model.modules()}, model.dtype
    model.eval()
    model.dtype = dtype
    try:
        yield
    finally:
        model.dtype = before
        for module, training in modes.items():
            module.training = training
