"""Samplers: a ``GenerativeModel`` and seeds in, images or whole trajectories out.

Image i owns its noise (see ``randomness.py``) and batches are fixed. So with a fixed-step method image i is the same,
bit for bit, for any number of processes.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.randomness import image_noise
from fmlit.core.tensors import Field, expand_time
from fmlit.flows.diffusions import BetaDiffusion, Diffusion
from fmlit.flows.predictions import Velocity
from fmlit.flows.times import Limits, sampling_limits, sigma_limits
from fmlit.models.generative_model import GenerativeModel, evaluation_mode
from fmlit.sampling.grids import EDMGrid, Grid, UniformGrid
from fmlit.sampling.guidance import WHOLE_CLOCK, Interval, check_guidance, check_labels, guided_velocity
from fmlit.sampling.names import sampler_name
from fmlit.solvers.records import SOLVERS, Kind, Option, solver_names
from fmlit.solvers.sde import NoiseSource

if TYPE_CHECKING:
    ODEMethod = str
    SDEMethod = str
    SolverName = str
else:  # what the command line offers is what the records hold
    ODEMethod = Literal[solver_names("ODE", "exponential")]
    SDEMethod = Literal[solver_names("SDE")]
    SolverName = Literal[solver_names()]
MOST_DATA = 0.1  # alpha where sampling starts: with unit variance, noise alone is then off by half a percent
Precision = Literal["float32", "bfloat16"]


class Sampler(ABC):
    """From noise to data along a model's field.

    A subclass follows the grid. This class does what they have in common: the initial noise, scaled by ``beta(t0)``
    where the grid starts at t0 > 0, and the closing denoising step ``x <- E[z | x]`` where the grid ends before t = 1.
    """

    method: str
    steps: int
    grid: Grid
    guidance: float
    guidance_interval: Interval = WHOLE_CLOCK
    precision: Precision = "float32"
    stochastic: ClassVar[bool] = False  # whether it follows the score, too
    kinds: ClassVar[tuple[Kind, ...]] = ()  # of the solvers that it can use; empty for a method of its own

    def __post_init__(self) -> None:
        """Find mistakes now, and not at the first sample, which training may take hours to reach."""
        if self.kinds and self.method not in (methods := solver_names(*self.kinds)):
            raise UserError(f"unknown method {self.method!r}: choose from {', '.join(methods)}")
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        if not isinstance(self.grid, Grid):
            raise UserError(f"grid must be a grid such as fmlit.UniformGrid(), got {self.grid!r}")
        check_guidance(self.guidance, self.guidance_interval)
        if self.precision not in get_args(Precision):
            raise UserError(f"unknown precision {self.precision!r}: choose from {', '.join(get_args(Precision))}")
        if self.kinds:
            SOLVERS[self.method].check_options(self.solver_options)

    @property
    def solver_options(self) -> dict[str, Option]:
        """The values of the solver's options."""
        return {name: getattr(self, name) for name in SOLVERS[self.method].options}

    @property
    def name(self) -> str:
        """``named`` without a guide."""
        return self.named()

    def named(self, guided: bool = False) -> str:
        """Method, steps and whatever differs from the sampler's defaults, for protocols: see ``names.py``."""
        return sampler_name(self, guided)

    def check(self, model: GenerativeModel, guide: GenerativeModel | None = None) -> None:
        """Raise a UserError where a model or guide does not have what the sampler follows, or steps are too few."""
        for key, value in (("model", model), ("guide", guide or model)):
            if not isinstance(value, GenerativeModel):
                raise UserError(
                    f"{key} must be a fmlit.GenerativeModel, got {type(value).__name__}; fmlit.load returns one"
                )
        if self.stochastic and (model.coupled or (guide is not None and guide.coupled)):
            raise UserError(
                f"{type(self).__name__} needs the score, which does not follow from the velocity of a model that was "
                f"trained on paired noise and data (model.draws.coupling): use ODESampler, as by --solver heun"
            )
        if self.guidance != 1 and guide is None and model.num_classes is None:
            raise UserError(f"guidance {self.guidance:g} needs a class-conditional model, or a guide")
        start = self.times(model)[:1]
        if (kept := float(model.path.alpha(start))) > MOST_DATA:
            warnings.warn(
                f"sampling starts from noise alone, and {model.path!r} still holds {kept:.2f} of the data at "
                f"t = {round(float(start), 4):g}: samples will be off; choose a path whose alpha begins near 0",
                stacklevel=2,
            )

    def times(self, model: GenerativeModel) -> Tensor:
        """The grid for a model, strictly increasing, float64. Raises a UserError where it needs more steps."""
        return self.grid.times(model.path, self.steps, self.limits(model))

    def limits(self, model: GenerativeModel) -> Limits:
        """The part of the clock on which the method's field is regular."""
        window = self.grid.sigma_min, self.grid.sigma_max
        if self.method in solver_names("exponential", "churn"):  # these divide by alpha and by the noise level
            return sigma_limits(model.path, *window)
        return sampling_limits(model.path, model.prediction, self.stochastic, *window)

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
            model: what to sample from. Its parts keep the mode, training or evaluation, that they are in.
            seeds: (B,) int64, one per image: it alone decides the image's noise. See ``randomness.image_seeds``.
            labels: (B,) int64 class ids, or None for unconditional samples.
            trajectory: return every state instead of the last.
            guide: a weaker model of the same data, from which ``guidance`` pushes away: autoguidance.

        Returns:
            (B, *shape) float32 on the model's device, or (points, B, *shape) with ``trajectory``.

        Raises:
            UserError: see ``check``; seeds or labels of a wrong type or shape; an unknown class; a guide of other data
                or on another path.
        """
        self.check(model, guide)
        if not isinstance(seeds, Tensor) or seeds.ndim != 1 or seeds.dtype != torch.int64:
            raise UserError("seeds must be an int64 tensor (B,), such as fmlit.core.randomness.image_seeds returns")
        labels = check_labels(model, seeds, labels)
        velocity = guided_velocity(model, labels, self.guidance, self.guidance_interval, guide)
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


@dataclass(frozen=True)
class ODESampler(Sampler):
    """Follows the probability-flow ODE ``dx = u_t(x) dt``.

    Args:
        method: name of the solver in ``fmlit.solvers``.
        steps: number of steps. ``dopri5`` chooses its own, and takes this as the number of output points.
        grid: where the steps lie.
        guidance: scale of classifier-free guidance, or of autoguidance where there is a guide. 1 disables guidance.
        guidance_interval: range of t in which guidance acts, from 0 (noise) to 1 (data).
        precision: arithmetic of the network. bfloat16 is faster on GPUs. The solver computes in float32 either way.
        options: options of the solver, such as order of unipc; docs/solvers.md lists them.
    """

    kinds = ("ODE", "exponential")

    method: ODEMethod = "heun"
    steps: int = 18
    grid: Grid = EDMGrid()
    guidance: float = 1.0
    guidance_interval: Interval = WHOLE_CLOCK
    precision: Precision = "float32"
    options: dict[str, Option] = field(default_factory=dict, hash=False)

    @property
    def solver_options(self) -> dict[str, Option]:
        return self.options

    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        solver = SOLVERS[self.method]
        path = (model.path,) if solver.kind == "exponential" else ()
        return solver.function(velocity, x0, times, *path, trajectory=trajectory, **self.options)


@dataclass(frozen=True)
class SDESampler(Sampler):
    """Follows ``dX = [u_t(X) + sigma_t^2 / 2 s_t(X)] dt + sigma_t dW``, which has the ODE's marginals for any sigma_t.

    Args:
        sigma: the diffusion coefficient sigma_t, lowered where steps could not follow it (see ``Diffusion.along``).
        method: name of the solver in ``fmlit.solvers``.
        steps: number of steps.
        grid: where the steps lie.
        guidance: scale of classifier-free guidance, or of autoguidance where there is a guide. 1 disables guidance.
        guidance_interval: range of t in which guidance acts, from 0 (noise) to 1 (data).
        precision: arithmetic of the network. bfloat16 is faster on GPUs. The solver computes in float32 either way.
    """

    stochastic, kinds = True, ("SDE",)

    sigma: Diffusion = BetaDiffusion()
    method: SDEMethod = "euler_maruyama"
    steps: int = 250
    grid: Grid = UniformGrid()
    guidance: float = 1.0
    guidance_interval: Interval = WHOLE_CLOCK
    precision: Precision = "float32"

    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        sigma = self.sigma.along(model.path, times.to(x0))

        def drift(x: Tensor, t: Tensor) -> Tensor:  # diffusions.sde_drift at the cost of one network evaluation
            u = velocity(x, t)
            return u + sigma(x, t).square() / 2 * Velocity().score(model.path, u, x, t)

        solver, noise = SOLVERS[self.method].function, _noise_of_images(seeds, model)
        return solver(drift, sigma, x0, times, noise=noise, trajectory=trajectory)


@dataclass(frozen=True)
class ChurnSampler(Sampler):
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): Heun steps between additions of noise.

    Args:
        steps: number of steps, each of two evaluations.
        s_churn: how much noise is added over all steps. 0 adds none. The defaults are EDM's for ImageNet-64 (table 5).
        s_min: lowest noise level beta / alpha at which noise is added.
        s_max: highest noise level at which noise is added.
        s_noise: scale of the added noise.
        grid: where the steps lie.
        guidance: scale of classifier-free guidance, or of autoguidance where there is a guide. 1 disables guidance.
        guidance_interval: range of t in which guidance acts, from 0 (noise) to 1 (data).
        precision: arithmetic of the network. bfloat16 is faster on GPUs. The solver computes in float32 either way.
    """

    method = "churn"
    stochastic, kinds = True, ("churn",)

    steps: int = 128
    s_churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003
    grid: Grid = EDMGrid()
    guidance: float = 1.0
    guidance_interval: Interval = WHOLE_CLOCK
    precision: Precision = "float32"

    def integrate(
        self, model: GenerativeModel, velocity: Field, x0: Tensor, times: Tensor, seeds: Tensor, trajectory: bool
    ) -> Tensor:
        noise, steps = _noise_of_images(seeds, model), self.steps  # with the closing step, as EDM counts
        solver = SOLVERS[self.method].function
        return solver(velocity, x0, times, model.path, noise, trajectory=trajectory, steps=steps, **self.solver_options)


def _noise_of_images(seeds: Tensor, model: GenerativeModel) -> NoiseSource:
    """The noise of every step, which each image owns."""
    return lambda step, like: image_noise(seeds, model.shape, "sde", step).to(like)
