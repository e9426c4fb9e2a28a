"""The weight of the training loss over time, for each prediction and path."""

import torch
from matplotlib.figure import Figure

from docs.draw.style import MUTED, panels, styled
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.predictions import Data, Noise, PreconditionedVelocity, Prediction, Score, Velocity

PATHS = (CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath())
SHOWN: tuple[tuple[Prediction, str], ...] = (
    (Velocity(), "-"),
    (Data(), "-"),
    (Noise(), "-"),
    (Score(), "-"),
    (PreconditionedVelocity(), ":"),
)


@styled
def loss_weights() -> Figure:
    """The flow matching weight of each prediction: one panel per path. Thin lines are the weights without the bound."""
    figure, axes = panels(1, len(PATHS), (9.5, 2.9), sharey=True)
    t = torch.linspace(0.005, 0.995, 400)
    for panel, path in zip(axes[0], PATHS, strict=True):
        for prediction, line in SHOWN:
            weight = prediction.flow_matching_weight(path, t)
            (drawn,) = panel.plot(t, weight, line, label=type(prediction).__name__)
            if isinstance(prediction, (Noise, Data)):
                panel.plot(t, prediction.gains(path, t).velocity.square(), color=drawn.get_color(), linewidth=0.5)
        panel.set(title=type(path).__name__, xlabel="t", yscale="log", ylim=(1e-3, 1e4), xlim=(0, 1))
        panel.axhline(1, color=MUTED, linewidth=0.4, zorder=0)
    axes[0, 0].set_ylabel("w(t)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN))
    return figure
