"""``GenerativeModel``: a network and the meaning of its output. Samplers and commands take this object."""

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
    """A network, the path that it was trained on, and its prediction. It offers every field that a sampler may follow.

    The fields ``velocity``, ``score``, ``noise`` and ``data`` take x (B, *shape), t (B,), and labels int64 (B,) or None
    for "unconditional". They return (B, *shape).

    Args:
        net: the network, called as ``net(x, t, labels)``.
        path: the Gaussian path.
        prediction: the meaning of the network's output.
        shape: shape of one data point, such as (3, 32, 32).
        num_classes: number of classes, or None for an unconditional model. The null label is ``num_classes``.
        coupled: whether the model was trained on paired noise and data (see ``couplings.py``). Its velocity, noise and
            data remain valid. Its ``score`` does not, because p_t(x | z) is no longer N(alpha z, beta^2 I).
        class_names: the names of the classes by id, if they have names.
    """

    def __init__(
        self,
        net: nn.Module,
        path: GaussianPath,
        prediction: Prediction,
        shape: Sequence[int],
        num_classes: int | None = None,
        coupled: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        for name, part, kind in (
            ("net", net, nn.Module),
            ("path", path, GaussianPath),
            ("prediction", prediction, Prediction),
        ):
            if not isinstance(part, kind):
                raise UserError(f"{name} must be a {kind.__qualname__}, got a {type(part).__qualname__}")
        if num_classes is not None and num_classes < 1:
            raise UserError(f"num_classes must be at least 1, or None for an unconditional model, got {num_classes}")
        if getattr(net, "num_classes", num_classes) != num_classes:
            raise UserError(
                f"{type(net).__name__} has num_classes={net.num_classes}, the model {num_classes}: make them equal"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise UserError(f"there are {len(class_names)} class_names for {num_classes or 'no'} classes")
        self.net, self.path, self.prediction = net, path, prediction
        self.shape, self.num_classes, self.coupled = tuple(shape), num_classes, coupled
        self.class_names = None if class_names is None else tuple(class_names)
        self.dtype: torch.dtype | None = None  # of the network's arithmetic, or None for the caller's

    @property
    def null_label(self) -> int | None:
        """The label that stands for "unconditional", or None if there are no classes."""
        return self.num_classes

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        weights = itertools.chain(self.net.parameters(), self.net.buffers())
        return next((w.device for w in weights), torch.device("cpu"))  # a closed form has no weights

    def with_net(self, net: nn.Module) -> "GenerativeModel":
        """The same model with another network, such as an averaged copy. Nothing is copied."""
        arguments = self.shape, self.num_classes, self.coupled, self.class_names
        return GenerativeModel(net, self.path, self.prediction, *arguments)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The raw output of the network at x."""
        if labels is None and self.num_classes is not None:
            labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
        elif labels is not None and self.num_classes is None:
            raise UserError("labels were given to an unconditional model; pass labels=None")
        # A compiled network would treat expanded times as a new case and compile again.
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
        """The marginal score grad log p_t(x).

        For a ``coupled`` model it is ``-E[eps | x] / beta``, which is not the score.
        """
        return self.prediction.score(self.path, self(x, t, labels), x, t)

    def noise(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The expected noise E[eps | x_t = x]."""
        return self.prediction.noise(self.path, self(x, t, labels), x, t)

    def data(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The denoised x, E[z | x_t = x]."""
        return self.prediction.data(self.path, self(x, t, labels), x, t)


@contextmanager
def evaluation_mode(model: GenerativeModel, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Put every part of the network into evaluation mode. Afterwards each part returns to its own mode.

    With ``dtype``, the network computes in that type by autocast. Its inputs and outputs keep their types.
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
