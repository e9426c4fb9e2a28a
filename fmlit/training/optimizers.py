"""Optimizers as a recipe names them: settings that build a ``torch.optim.Optimizer`` once the network exists."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fmlit.core.errors import UserError
from fmlit.training.muon import MuonAdamW


class OptimizerConfig(ABC):
    """The settings of an optimizer, and how to build it.

    ``AdamW`` and ``Muon`` are ready to use, and ``TorchOptimizer`` covers the rest of ``torch.optim``. For any other
    optimizer write a frozen dataclass::

        @dataclass(frozen=True)
        class Lion(fmlit.OptimizerConfig):
            learning_rate: float = 1e-4

            def build(self, net, others=(), fused=False):
                return lion_pytorch.Lion([*net.parameters(), *others], lr=self.learning_rate)

    A recipe names it as ``optimizer: my_package.Lion``.

    Attributes:
        learning_rate: the learning rate after warm-up.
    """

    learning_rate: float

    @property
    def kind(self) -> str:
        """The name of the algorithm. A run can only be resumed with the one that it was started with."""
        return type(self).__name__

    @abstractmethod
    def build(self, net: nn.Module, others: Iterable[nn.Parameter] = (), fused: bool = False) -> Optimizer:
        """Build the optimizer.

        Args:
            net: the network.
            others: parameters outside the network to train as well.
            fused: use the fused kernel of torch, if the optimizer has one.
        """


@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101).

    Args:
        learning_rate: learning rate after warm-up.
        betas: decay rates of the two moments.
        weight_decay: decoupled weight decay.

    Raises:
        UserError: a setting is out of range.
    """

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_learning_rate(self.learning_rate)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay must not be negative, got {self.weight_decay}")

    def build(self, net: nn.Module, others: Iterable[nn.Parameter] = (), fused: bool = False) -> Optimizer:
        weights = [*net.parameters(), *others]
        return torch.optim.AdamW(weights, self.learning_rate, self.betas, weight_decay=self.weight_decay, fused=fused)


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon for hidden matrices and kernels, AdamW for the rest (Jordan 2024, https://kellerjordan.github.io/posts/muon).

    Both parts share the learning rate and the weight decay. ``MuonAdamW`` describes the algorithm.

    Args:
        learning_rate: learning rate after warm-up, of both parts.
        betas: decay rates of AdamW's two moments.
        weight_decay: decoupled weight decay, of both parts.
        momentum: decay rate of Muon's running mean of gradients.
        nesterov: look one step of the momentum ahead.
        ns_steps: Newton-Schulz iterations.

    Raises:
        UserError: a setting is out of range; from ``build``, if the network has no hidden matrix.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.ns_steps < 1:
            raise UserError(f"ns_steps must be at least 1, got {self.ns_steps}")

    def build(self, net: nn.Module, others: Iterable[nn.Parameter] = (), fused: bool = False) -> Optimizer:
        shared = self.learning_rate, self.betas, self.weight_decay
        return MuonAdamW(net, *shared, self.momentum, self.nesterov, self.ns_steps, fused, others)


@dataclass(frozen=True)
class TorchOptimizer(OptimizerConfig):
    """Any optimizer of ``torch.optim``, by name.

    For example ``--model.optimizer TorchOptimizer --model.optimizer.name SGD --model.optimizer.settings.momentum 0.9``.

    Args:
        name: name of the class in ``torch.optim``, such as SGD.
        learning_rate: learning rate after warm-up.
        settings: the other arguments of the class. Give ``fused: true`` here if you want its fused kernel.

    Raises:
        UserError: no such class; from ``build``, if the class refuses the settings or the network.
    """

    name: str
    learning_rate: float = 2e-4
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_learning_rate(self.learning_rate)
        known = [name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and name != "Optimizer"]
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(known))}"
            raise UserError(f"name: torch.optim has no optimizer {self.name}; {hint}")

    @property
    def kind(self) -> str:
        return self.name

    def build(self, net: nn.Module, others: Iterable[nn.Parameter] = (), fused: bool = False) -> Optimizer:
        try:
            cls: Callable[..., Optimizer] = getattr(torch.optim, self.name)
            return cls([*net.parameters(), *others], lr=self.learning_rate, **self.settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.optimizer: torch.optim.{self.name}: {error}") from error


def _check_learning_rate(learning_rate: float) -> None:
    if not learning_rate > 0:
        raise UserError(f"learning_rate must be positive, got {learning_rate}")


def match_state_strides(optimizer: Optimizer) -> None:
    """Give the optimizer's state the strides of its parameters, whose memory format may differ from the saved one."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def replace_saved_settings(checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
    """Overwrite the settings in a Lightning checkpoint, in place, by those of a new optimizer.

    Otherwise ``load_state_dict`` would bring back the settings with which the checkpoint was saved.
    """
    for state in checkpoint.get("optimizer_states", []):
        for saved, current in zip(state["param_groups"], optimizer.param_groups, strict=True):
            saved.update({name: value for name, value in current.items() if name != "params"})
