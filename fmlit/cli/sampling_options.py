"""The options that ``sample`` and ``evaluate`` share: how the solver samples, and with which guide."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from fmlit.cli.options import Numbers
from fmlit.core.errors import UserError
from fmlit.flows.diffusions import Diffusion
from fmlit.models.compilation import CompileMode, compile_net
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.build import build_sampler
from fmlit.sampling.grids import Grid
from fmlit.sampling.guidance import WHOLE_CLOCK
from fmlit.sampling.samplers import Precision, Sampler
from fmlit.solvers.records import Option
from fmlit.storage.loading import find_model, load


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the solver samples.

    Args:
        solver_options: Options of the solver, such as --solver_options.order 3 for unipc; docs/solvers.md lists them.
        guidance_interval: Range of t in which guidance acts, from 0 (noise) to 1 (data), such as 0.2,0.8.
        grid: Where the steps lie.
        sigma: Diffusion coefficient of an SDE: a number, or a class.
        guide: Checkpoint of a weaker model of the same data (smaller, or less trained) for autoguidance.
        precision: Arithmetic of the network: float32, or bfloat16, which is faster on GPUs.
    """

    solver_options: dict[str, Option] | None = None
    guidance_interval: Numbers = Numbers(WHOLE_CLOCK)
    grid: Grid | None = None
    sigma: Diffusion | float | None = None
    guide: str | None = None
    precision: Precision = "float32"

    def build(self, solvers: Sequence[str], steps: Sequence[int | None], guidance: Sequence[float]) -> list[Sampler]:
        """The sampler of each combination. A UserError for values that it refuses, or that have no effect."""
        if len(self.guidance_interval) != 2:
            given = ",".join(map(str, self.guidance_interval))
            raise UserError(f"guidance_interval takes two numbers, such as 0.2,0.8, got {given}")
        start, end = self.guidance_interval
        if set(guidance) == {1} and (start, end) != WHOLE_CLOCK:
            raise UserError("guidance_interval has no effect with guidance 1: set --guidance, too")
        settings = self.sigma, self.precision, (start, end), self.solver_options
        return [
            build_sampler(name, n, self.grid, scale, *settings) for name, n, scale in product(solvers, steps, guidance)
        ]

    def load(
        self, file: Path, weights: str, compile: CompileMode | None, trust: Sequence[str], device: torch.device
    ) -> tuple[GenerativeModel, GenerativeModel | None]:
        """The model with these weights, and the guide with the first average of its own; compiled where asked."""
        model = load(file, weights, trust, device).requires_grad_(False)
        guide = None
        if self.guide is not None:
            guide = load(find_model(self.guide, "guide"), "ema", trust, device).requires_grad_(False)
        for part in filter(None, (model, guide)):
            if compile:
                compile_net(part.net, compile)
        return model, guide
