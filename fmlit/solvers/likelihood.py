"""Exact log-likelihood of the model that an ODE defines, and bits per dimension of 8-bit images.

A normalizing flow z = f(x0) built from layers knows its density by the change of variables,
``log p(z) = log p(x0) - sum_layers log |det J_layer|``, and has to shape every layer so that it inverts and its
determinant is cheap. In a continuous flow each instant is the layer x + u dt; its log-determinant is tr(du/dx) dt for
any field u, and the sum becomes an integral along the path that ends in z (Chen et al. 2018)::

    log p_1(z) = log N(x_0; 0, I) - integral_0^1 div u_t(x_t) dt

A flow that starts at t0 > 0 starts from noise of scale beta(t0), as samplers do, and its prior is N(0, beta(t0)^2 I).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.core.tensors import Field, from_uint8
from fmlit.flows.paths import GaussianPath

LEVEL = 1 / 127.5  # distance between two gray levels of images in [-1, 1]


def log_likelihood(
    field: Field,
    z: Tensor,
    times: Tensor,
    divergence: Literal["exact", "hutchinson"] = "exact",
    solver: Callable[[Field, Tensor, Tensor], Tensor] = solvers.rk4,
    generator: torch.Generator | None = None,
    path: GaussianPath | None = None,
) -> Tensor:
    """log p(z) in nats, (B,), of the flow that carries Gaussian noise at times[0] to z at times[-1].

    Args:
        field: velocity (x (B, *shape), t (B,)) -> (B, *shape), differentiable in x, each row a function of its own x.
        z: points (B, *shape).
        times: (N + 1,) increasing; the solver runs through them backwards.
        divergence: "exact" takes the trace with one backward pass per dimension. "hutchinson" estimates it without
            bias by v . (du/dx) v with one Rademacher probe v per sample, the same at all times, so that the integrand
            stays smooth (Grathwohl et al. 2019): one backward pass.
        solver: a function of ``fmlit.solvers`` that takes (field, x0, times).
        generator: source of the probe, on its own device.
        path: the noise has the scale ``path.beta(times[0])``, as that of a sampler of this path. None: standard normal.

    The result carries no gradient. Raises UserError for times that do not increase and for an unknown divergence.
    """
    if divergence not in ("exact", "hutchinson"):
        raise UserError(f"divergence must be 'exact' or 'hutchinson', got {divergence!r}")
    if times.ndim != 1 or len(times) < 2 or not (times.diff() > 0).all():
        raise UserError(f"times must be at least two increasing numbers, got {times.tolist()}")
    probe = _rademacher(z, generator) if divergence == "hutchinson" else None
    first, last = times[0].item(), times[-1].item()

    def reverse(state: Tensor, s: Tensor) -> Tensor:
        """d/ds of (x, -integral of the divergence from t to times[-1]) at t = times[-1] - s."""
        t = (last - s).clamp(first, last)  # rounding must not leave the clock
        velocity, trace = velocity_and_divergence(field, state[:, :-1].reshape(z.shape), t, probe)
        return -torch.cat([velocity.flatten(1), trace[:, None]], dim=1)

    start = torch.cat([z.flatten(1), z.new_zeros(len(z), 1)], dim=1)
    end = solver(reverse, start, last - times.flip(0))
    x0, log_volume = end[:, :-1], end[:, -1]
    std = 1.0 if path is None else path.beta(times[:1].double()).item()
    return -(x0.square().sum(1) / std**2 + x0.shape[1] * math.log(2 * math.pi * std**2)) / 2 + log_volume


def velocity_and_divergence(field: Field, x: Tensor, t: Tensor, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u(x, t) and div u, (B, *shape) and (B,): the exact trace, or probe . (du/dx) probe for a probe (B, *shape)."""
    with torch.inference_mode(False), torch.enable_grad():  # Lightning evaluates in inference mode
        x, t = x.clone().requires_grad_(), t.clone()
        velocity = field(x, t)
        if probe is not None:
            product = _gradient(velocity, x, probe)
            return velocity.detach(), (product * probe).flatten(1).sum(1)
        outputs, trace = velocity.flatten(1).sum(0), x.new_zeros(len(x))
        for i in range(len(outputs)):
            trace += _gradient(outputs[i], x, retain_graph=True).flatten(1)[:, i]
        return velocity.detach(), trace


def _gradient(output: Tensor, x: Tensor, vector: Tensor | None = None, retain_graph: bool = False) -> Tensor:
    found = None
    if output.requires_grad:
        (found,) = torch.autograd.grad(output, x, vector, retain_graph, allow_unused=True)
    if found is None:
        raise UserError("the field does not depend on x differentiably, so its divergence cannot be taken")
    return found


def _rademacher(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent signs in the shape, dtype and device of ``like``."""
    device = like.device if generator is None else generator.device
    return torch.randint(0, 2, like.shape, generator=generator, device=device).mul(2).sub(1).to(like)


def dequantize(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 images (B, C, H, W) as float32 around [-1, 1], each value uniform over the width of its gray level.

    By Jensen, E[log p(dequantized)] + C H W log LEVEL bounds log P(images) from below (Theis et
    al. 2016), so ``bits_per_dimension`` of dequantized images never flatters the model.
    """
    noise = torch.rand(images.shape, generator=generator, device=generator.device).to(images.device)
    return from_uint8(images) + (noise - 0.5) * LEVEL


def bits_per_dimension(log_prob: Tensor, shape: Sequence[int]) -> Tensor:
    """Bits per dimension, (B,), from log densities in nats of ``dequantize``d 8-bit images of this ``shape`` (C, H, W).

    Gray levels lie LEVEL apart, so each dimension turns a density into a probability by a factor LEVEL, which adds
    log2(127.5) bits. A uniform density over the 256 levels gives 8.
    """
    dimensions = math.prod(shape)
    return -log_prob / (dimensions * math.log(2)) - math.log2(LEVEL)
