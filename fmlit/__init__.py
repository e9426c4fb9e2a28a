"""fmlit: flow matching and score-based diffusion for image generation, on PyTorch Lightning.

The public names below load on first use (PEP 562), so ``import fmlit`` itself is instant. Recipes, checkpoints and
exports refer to classes by these names, such as ``fmlit.UNet``, and never by the module that defines them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "fmlit.paths": ("CondOTPath", "CosinePath", "GaussianPath", "PolynomialPath", "VPPath"),
    "fmlit.predictions": ("Data", "Noise", "Prediction", "PreconditionedVelocity", "Score", "Velocity"),
    "fmlit.mixtures": ("GaussianMixture",),
    "fmlit.times": ("EDMGrid", "Grid", "LogitNormalTime", "LogitSNRGrid", "TimeLaw", "UniformGrid", "UniformTime"),
    "fmlit.couplings": ("Coupling", "IndependentCoupling", "OptimalTransportCoupling"),
    "fmlit.dynamics": ("BetaDiffusion", "ConstantDiffusion", "Diffusion", "ReverseDiffusion"),
    "fmlit.likelihood": ("bits_per_dimension", "log_likelihood"),
    "fmlit.networks": ("MLP", "UNet"),
    "fmlit.generative": ("GenerativeModel",),
    "fmlit.samplers": ("ChurnSampler", "ODESampler", "SDESampler", "Sampler"),
    "fmlit.data.base": ("DataModule",),
    "fmlit.data.cifar10": ("CIFAR10",),
    "fmlit.data.digits": ("Digits",),
    "fmlit.data.folder": ("ImageFolder",),
    "fmlit.data.mnist": ("MNIST",),
    "fmlit.data.toys": ("Checkerboard", "Moons", "TwoPoints"),
    "fmlit.metrics.dinov2": ("DINOv2Features",),
    "fmlit.metrics.features": ("Features", "NetworkFeatures", "PixelFeatures"),
    "fmlit.metrics.inception": ("InceptionFeatures",),
    "fmlit.loggers": ("WandbLogger",),
    "fmlit.modules": ("FlowMatchingModule", "GenerativeModule", "ScoreMatchingModule"),
}
PUBLIC = {name: module for module, names in _HOMES.items() for name in names}  # public name to defining module

__all__ = ["__version__", *sorted(PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fmlit' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
