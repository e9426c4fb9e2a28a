"""``MuonAdamW``: one optimizer that updates hidden matrices and kernels by Muon and everything else by AdamW."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fmlit.core.errors import UserError
from fmlit.core.internals import copy_all

MIN_CHANNELS = 16  # pictures have fewer, so that the first and the last layer of a U-Net are not hidden
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # x -> a x + b x^3 + c x^5, the steepest at 0 (Jordan 2024)
RMS_OF_ADAMW = 0.2  # root mean square of AdamW's update in units of its learning rate (Liu et al. 2025, section 2.2)


def hidden_matrices(net: nn.Module) -> list[nn.Parameter]:
    """The weights of Linear and Conv layers with at least 16 channels on both sides, in the order of ``parameters()``.

    A kernel is the matrix (out, in * k * k). Where convolutions are grouped, the channels of a group count as "in", so
    depthwise ones are left out; so are transposed ones, whose first dimension is "in". An ``MLP``'s first and last
    layer count as hidden where the data has 16 values or more.
    """
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    weights = {layer.weight for layer in layers if min(layer.weight.shape[:2]) >= MIN_CHANNELS}
    return [parameter for parameter in net.parameters() if parameter in weights]


class MuonAdamW(Optimizer):
    """Muon (Jordan 2024) for ``hidden_matrices(net)``, AdamW for the other parameters of ``net`` and for ``others``.

    Muon's update is the momentum's nearest orthogonal matrix, roughly, times ``0.2 sqrt(max(out, in * k * k))``: then
    its root mean square is AdamW's, and both parts share one learning rate and one decoupled weight decay (Liu et al.
    2025, "Muon is scalable for LLM training").

    ``torch.optim.Muon`` takes 2-D parameters alone, launches every matrix on its own, and cannot skip a step without
    waiting for the device. Here kernels are reshaped, matrices of one shape go through Newton-Schulz together, and
    where ``found_inf`` (a float tensor on the device, as gradient scalers set it; needs ``fused``) is 1, nothing moves.

    Cost per step, whatever the batch: ``ns_steps (4 m^2 n + 2 m^3)`` FLOPs for a matrix of m x n, m <= n. Memory: one
    buffer as large as the weights, where AdamW has two.

    Args:
        net: the network.
        lr: learning rate of both parts.
        betas: AdamW's.
        weight_decay: decoupled, of both parts.
        momentum: Muon's, a running mean of gradients.
        nesterov: look one step of the momentum ahead.
        ns_steps: Newton-Schulz iterations.
        fused: use AdamW's fused kernel.
        others: parameters outside the network.

    Raises:
        UserError: the network has no hidden matrix.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        fused: bool = False,
        others: Iterable[nn.Parameter] = (),
    ) -> None:
        matrices = hidden_matrices(net)
        if not matrices:
            lack = f"no hidden matrix for Muon, no layer with at least {MIN_CHANNELS} channels on both sides"
            raise UserError(f"{type(net).__name__} has {lack}: use AdamW, or a wider network")
        taken = set(matrices)
        rest = [parameter for parameter in net.parameters() if parameter not in taken]
        # A list of groups, since a plain list of parameters may not be empty.
        self._adamw: Any = AdamW([{"params": [*rest, *others]}], lr, betas, weight_decay=weight_decay, fused=fused)
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        muon = {"params": matrices, **settings, "ns_steps": ns_steps, "muon": True}
        super().__init__([*self._adamw.param_groups, muon], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both parts; returns what ``closure`` returns, which is called first, with gradients."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        others, muon = self.param_groups
        self._adamw.param_groups, self._adamw.state = [others], self.state  # load_state_dict has new ones made
        self._adamw.found_inf = found_inf = getattr(self, "found_inf", None)  # after the closure, which may set it
        self._adamw.step()
        skip = None if found_inf is None else found_inf.bool()
        for parameters in _by_matrix_shape(muon["params"]):
            self._step_matrices(parameters, muon, skip)
        return loss

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        """Muon's step for parameters that are matrices of one shape."""
        momenta = [self._momentum(parameter) for parameter in parameters]
        gradient = _stack([p.grad for p in parameters if p.grad is not None])
        momentum, weight = _stack(momenta), _stack(parameters)
        if skip is not None:
            # Multiplying by 0 would not do: 0 * nan is nan. With itself for a gradient the momentum stays what it is.
            gradient = torch.where(skip, momentum, gradient)
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalize(update.to(_precision(update.device)), group["ns_steps"]).to(weight.dtype)
        size = group["lr"] * RMS_OF_ADAMW * math.sqrt(max(update.shape[1:]))
        moved = (weight * (1 - group["lr"] * group["weight_decay"])).sub_(update, alpha=size)
        if skip is not None:
            moved = torch.where(skip, weight, moved)
        # Into the old tensors: they keep their strides, so that channels_last stays channels_last.
        copy_all(momenta, [new.view_as(old) for new, old in zip(momentum, momenta, strict=True)])
        copy_all(parameters, [new.view_as(old) for new, old in zip(moved, parameters, strict=True)])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor U V^T of each matrix U S V^T, roughly: in place of S, values between 0.68 and 1.21.

    ``steps`` Newton-Schulz iterations on all matrices (n, rows, columns) at once, in their precision. The bounds are
    those of 5 steps, for singular values of at least 0.0015 times the Frobenius norm; smaller ones stay smaller.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the smaller of the two Gram matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _precision(device: torch.device) -> torch.dtype:
    """Newton-Schulz's: bfloat16 is enough for it (Jordan 2024), but slow on CPUs that have no instructions for it."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _by_matrix_shape(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Those with a gradient, in groups that can be stacked."""
    groups: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            rows = parameter.size(0)
            groups[rows, parameter.numel() // rows, parameter.device, parameter.dtype].append(parameter)
    return groups.values()


def _stack(tensors: list[Tensor]) -> Tensor:
    """(n, rows, columns), in the order of the indices whatever the memory format."""
    return torch.stack([tensor.flatten(1) for tensor in tensors])
