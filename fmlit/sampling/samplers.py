"""Samplers: a ``GenerativeModel`` and seeds in, images or whole trajectories out.

Image i owns its noise (see ``randomness.py``) and batches are fixed, so that with a fixed-step method image i is
bit-identical for any number of processes.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.core.randomness import image_noise
from fmlit.core.tensors import Field, expand_time
from fmlit.flows.diffusions import BetaDiffusion, Diffusion
from fmlit.flows.predictions import Velocity
from fmlit.flows.times import Limits, sampling_limits, sigma_limits
from fmlit.models.generative_model import GenerativeModel, evaluation_mode
from fmlit.sampling.grids import EDMGrid, Grid, UniformGrid
from fmlit.sampling.guidance import autoguided_velocity, checked_labels, guided_velocity
from fmlit.solvers.sde import check_churn

ODEMethod = Literal["euler", "midpoint", "heun", "rk4", "dopri5", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm"]
SDEMethod = Literal["euler_maruyama", "stochastic_heun"]
Precision = Literal["float32", "bfloat16"]
EXPONENTIAL = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm")


def _label(key: str, value: Any) -> str:
    """A number after its key; for a grid or diffusion its class and whatever is not its default: ``edm_rho5``."""
    if isinstance(value, (int, float)):
        return f"{key}{value:g}"
    if isinstance(value, str):
        return value
    kind = type(value).__name__.removesuffix("Grid").removesuffix("Diffusion").lower()
    changed = [f.name for f in fields(value) if getattr(value, f.name) != f.default] if is_dataclass(value) else []
    return "_".join([kind, *(_label(name, getattr(value, name)) for name in changed)])


class Sampler(ABC):
    """From noise to data along a model's field.

    A subclass walks the grid; what is common is here: the initial noise, scaled by ``beta(t0)`` where the grid starts
    at t0 > 0, and the closing denoising step ``x <- E[z | x]`` where the grid ends before t = 1.
    """

    method: str
    steps: int
    grid: Grid
    guidance: float
    precision: Precision = "float32"
    stochastic: bool = False  # whether it follows the score, too

    @property
    def name(self) -> str:
        """``named`` without a guide."""
        return self.named()

    def named(self, guided: bool = False) -> str:
        """Method, steps and whatever differs from the sampler's defaults, for protocols.

        ``heun18``, ``midpoint10+uniform`` (a grid), ``unipc10+cfg1.5`` (classifier-free guidance, or ``auto1.5`` by a
        guide), ``eulermaruyama250+reverse`` (a diffusion coefficient), ``heun18+bfloat16`` (the network's arithmetic),
        ``dopri5`` (which chooses its own steps).
        """
        steps = "" if self.method == "dopri5" else self.steps
        parts = [f"{self.method.replace('_', '')}{steps}"]
        for key, parameter in signature(type(self)).parameters.items():
            value = getattr(self, key, parameter.default)
            if key not in ("method", "steps", "guidance") and value != parameter.default:
                parts.append(_label(key, value))
        if self.guidance != 1:
            parts.append(f"{'auto' if guided else 'cfg'}{self.guidance:g}")
        return re.sub(r"[^A-Za-z0-9_.+]", "_", "+".join(parts))  # what protocols take

    def check(self, model: GenerativeModel, guide: GenerativeModel | None = None) -> None:
        """Raise a UserError where a model or guide does not have what the sampler follows, or steps are too few."""
        if self.stochastic and (model.coupled or (guide is not None and guide.coupled)):
            raise UserError(
                f"{type(self).__name__} needs the score, which does not follow from the velocity of a model that was "
                f"trained on paired noise and data (model.draws.coupling): use ODESampler, as by --solver heun"
            )
        if self.guidance != 1 and guide is None and model.num_classes is None:
            raise UserError(f"guidance {self.guidance:g} needs a class-conditional model, or a guide")
        self.times(model)

    def times(self, model: GenerativeModel) -> Tensor:
        """The grid for a model, strictly increasing, float64. Raises a UserError where it needs more steps."""
        return self.grid.times(model.path, self.steps, self.limits(model))

    @abstractmethod
    def limits(self, model: GenerativeModel) -> Limits:
        """The part of the clock on which the method's field is regular."""

    @abstractmethod
    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        """From x0 at times[0] to times[-1]: the end point (B, *shape), or all states (len(times), B, *shape)."""

    @torch.no_grad()
    def sample(
        self,
        model: GenerativeModel,
        seeds: Tensor,
        labels: Tensor | None = None,
        trajectory: bool = False,
        guide: GenerativeModel | None = None,
    ) -> Tensor:
        """Draw one sample per seed.

        Args:
            model: what to sample from; its parts are left in the mode, training or evaluation, in which they were.
            seeds: (B,) int64, one per image: it alone decides the image's noise. See ``randomness.image_seeds``.
            labels: (B,) int64 class ids, or None for unconditional samples.
            trajectory: return every state instead of the last.
            guide: a weaker model of the same data, away from which ``guidance`` then pushes: autoguidance.

        Returns:
            (B, *shape) float32 on the model's device, or (points, B, *shape) with ``trajectory``.

        Raises:
            UserError: see ``check``; a label is none of the model's; the guide is of other data or on another path.
        """
        self.check(model, guide)
        known = checked_labels(model, seeds, labels)
        if guide is None:
            velocity = guided_velocity(model, known, self.guidance)
        else:
            velocity = autoguided_velocity(model, guide, known, self.guidance)
        times = self.times(model)
        dtype = None if self.precision == "float32" else torch.bfloat16
        with evaluation_mode(model, dtype), evaluation_mode(guide or model, dtype):
            noise = image_noise(seeds, model.shape).to(model.device)
            start = times[0].to(noise).expand(len(seeds))
            states = self.integrate(
                model, velocity, expand_time(model.path.beta(start), noise) * noise, times, seeds, trajectory
            )
            if times[-1] < 1:
                last = states[-1] if trajectory else states
                end = times[-1].to(noise).expand(len(seeds))
                data = Velocity().data(model.path, velocity(last, end), last, end)
                states = torch.cat([states, data[None]]) if trajectory else data
        return states


class ODESampler(Sampler):
    """Follows the probability-flow ODE ``dx = u_t(x) dt``.

    Args:
        method: the solver, by its name in ``fmlit.solvers``.
        steps: number of steps; for ``dopri5`` the number of output points only, as its own steps adapt.
        grid: where the steps lie.
        guidance: classifier-free guidance scale, or that of autoguidance; 1 is none.
        precision: of the network; bfloat16 is faster on GPUs, and the state of the solver stays float32.
    """

    def __init__(
        self,
        method: ODEMethod = "heun",
        steps: int = 18,
        grid: Grid = EDMGrid(),
        guidance: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        _check_sampler(method, get_args(ODEMethod), steps, guidance, precision)
        self.method, self.steps, self.grid, self.guidance, self.precision = method, steps, grid, guidance, precision

    def limits(self, model: GenerativeModel) -> Limits:
        # Exponential solvers divide by alpha and by the noise level, so they need the regular part of the clock.
        window = self.grid.sigma_min, self.grid.sigma_max
        if self.method in EXPONENTIAL:
            return sigma_limits(model.path, *window)
        return sampling_limits(model.path, model.prediction, False, *window)

    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        solver = getattr(solvers, self.method)
        if self.method in EXPONENTIAL:
            return solver(velocity, x0, times, model.path, trajectory=trajectory)
        return solver(velocity, x0, times, trajectory=trajectory)


class SDESampler(Sampler):
    """Follows ``dX = [u_t(X) + sigma_t^2 / 2 s_t(X)] dt + sigma_t dW``, which has the ODE's marginals for any sigma_t.

    Args:
        sigma: the diffusion coefficient sigma_t, lowered where steps could not follow it (see ``Diffusion.along``).
        method: the solver, by its name in ``fmlit.solvers``.
        steps: number of steps.
        grid: where the steps lie.
        guidance: classifier-free guidance scale, or that of autoguidance; 1 is none.
        precision: of the network; bfloat16 is faster on GPUs, and the state of the solver stays float32.
    """

    stochastic = True

    def __init__(
        self,
        sigma: Diffusion = BetaDiffusion(),
        method: SDEMethod = "euler_maruyama",
        steps: int = 250,
        grid: Grid = UniformGrid(),
        guidance: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        _check_sampler(method, get_args(SDEMethod), steps, guidance, precision)
        self.sigma, self.method, self.steps, self.grid = sigma, method, steps, grid
        self.guidance, self.precision = guidance, precision

    def limits(self, model: GenerativeModel) -> Limits:
        window = self.grid.sigma_min, self.grid.sigma_max
        return sampling_limits(model.path, model.prediction, True, *window)

    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        sigma = self.sigma.along(model.path, times.to(x0))

        def drift(x: Tensor, t: Tensor) -> Tensor:  # dynamics.sde_drift at the cost of one network evaluation
            u = velocity(x, t)
            return u + sigma(x, t).square() / 2 * Velocity().score(model.path, u, x, t)

        def noise(step: int, like: Tensor) -> Tensor:
            return image_noise(seeds, model.shape, "sde", step).to(like)

        return getattr(solvers, self.method)(drift, sigma, x0, times, noise=noise, trajectory=trajectory)


class ChurnSampler(Sampler):
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): Heun steps between additions of noise.

    Args:
        steps: number of steps, each of two evaluations.
        s_churn: how much noise is added over all steps; 0 is none. The defaults are EDM's for ImageNet-64 (table 5).
        s_min: the noise level beta/alpha above which it is added.
        s_max: and below which.
        s_noise: scale of the added noise.
        grid: where the steps lie.
        guidance: classifier-free guidance scale, or that of autoguidance; 1 is none.
        precision: of the network; bfloat16 is faster on GPUs, and the state of the solver stays float32.
    """

    method = "churn"
    stochastic = True

    def __init__(
        self,
        steps: int = 128,
        s_churn: float = 40.0,
        s_min: float = 0.05,
        s_max: float = 50.0,
        s_noise: float = 1.003,
        grid: Grid = EDMGrid(),
        guidance: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        _check_sampler(self.method, (self.method,), steps, guidance, precision)
        check_churn(s_churn, s_min, s_max, s_noise)
        self.steps, self.grid, self.guidance, self.precision = steps, grid, guidance, precision
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise

    def limits(self, model: GenerativeModel) -> Limits:
        return sigma_limits(model.path, self.grid.sigma_min, self.grid.sigma_max)

    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        def noise(step: int, like: Tensor) -> Tensor:
            return image_noise(seeds, model.shape, "sde", step).to(like)

        knobs = (self.s_churn, self.s_min, self.s_max, self.s_noise)
        path, steps = model.path, self.steps  # with the closing step, as EDM counts
        return solvers.churn(velocity, x0, times, path, *knobs, noise=noise, trajectory=trajectory, steps=steps)


def _check_sampler(method: str, methods: Sequence[str], steps: int, guidance: float, precision: str) -> None:
    """Now, not at the first sample, which training may take hours to reach."""
    if method not in methods:
        raise UserError(f"unknown method {method!r}: choose from {', '.join(methods)}")
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance must be finite and at least 0, got {guidance}")
    if precision not in get_args(Precision):
        raise UserError(f"unknown precision {precision!r}: choose from {', '.join(get_args(Precision))}")
