"""Images on their way between noise and data: along the conditional path, and sampled by a trained model."""

import torch
from matplotlib.figure import Figure

from docs.draw import style
from docs.draw.memorization import real_digits
from fmlit.core.errors import UserError
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.flows.diffusions import BetaDiffusion
from fmlit.flows.paths import CondOTPath, CosinePath, VPPath
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.generate import balanced_labels
from fmlit.sampling.grids import UniformGrid
from fmlit.sampling.samplers import ODESampler, SDESampler

COLUMNS = 11


@style.styled
def noising() -> Figure:
    """One digit along three conditional paths, from the same noise."""
    t = torch.linspace(0, 1, COLUMNS)
    z = real_digits()[[3]].expand(COLUMNS, -1, -1, -1)
    eps = image_noise(torch.zeros(1, dtype=torch.int64), z.shape[1:]).expand_as(z)
    paths = {"CondOT": CondOTPath(), "cosine": CosinePath(), "VP": VPPath()}
    rows = torch.stack([path.sample(z, eps, t) for path in paths.values()])
    figure, ((axes,),) = style.panels(1, 1, (9.6, 3.1))
    style.image_rows(axes, rows, list(paths), [f"{time:.1f}" for time in t])
    axes.set(title="$x_t = \\alpha_t z + \\beta_t \\varepsilon \\sim p_t(\\cdot \\mid z)$", xlabel="$t$")
    return figure


@style.styled
def sampling_trajectories(model: GenerativeModel, digits: int = 3, steps: int = 100) -> Figure:
    """X_t of a trained image model along its ODE and its SDE, from the same noise, with steps equal in t."""
    if len(model.shape) != 3:
        raise UserError(f"sampling trajectories are drawn of images (C, H, W), and this model makes {model.shape}")
    seeds = image_seeds(0, range(3, 3 + digits))
    labels = balanced_labels(model, range(3, 3 + digits))
    samplers = {
        "ODE by Heun's method": ODESampler("heun", steps, UniformGrid()),
        "SDE by Euler-Maruyama": SDESampler(BetaDiffusion(1.0), steps=steps, grid=UniformGrid()),
    }
    classes = [] if labels is None else [str(label) for label in labels.tolist()]
    figure, axes = style.panels(len(samplers), 1, (9.6, 1.1 + 2 * 0.85 * digits))
    for (name, sampler), panel in zip(samplers.items(), axes[:, 0], strict=True):
        times = sampler.times(model).tolist()
        states = sampler.sample(model, seeds, labels, trajectory=True)
        stops = torch.linspace(0, len(states) - 1, COLUMNS).round().long().tolist()
        clock = [f"{[*times, 1.0][stop]:.2f}" for stop in stops]
        style.image_rows(panel, states[stops].transpose(0, 1).cpu(), classes, clock)
        panel.set(title=f"$X_t$ of the {name}, {steps} steps")
    axes[-1, 0].set_xlabel("$t$")
    return figure
