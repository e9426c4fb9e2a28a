"""fmlit: flow matching and score-based diffusion for image generation, on PyTorch Lightning.

The public names below load on first use (PEP 562), so ``import fmlit`` itself is instant. Recipes, checkpoints and
exports refer to classes by these names, such as ``fmlit.UNet``, and never by the module that defines them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {  # defining module: its public names
    "fmlit.core.errors": "UserError",
    "fmlit.flows.couplings": "Coupling IndependentCoupling OptimalTransportCoupling",
    "fmlit.flows.diffusions": "BetaDiffusion ConstantDiffusion Diffusion ReverseDiffusion",
    "fmlit.flows.mixtures": "GaussianMixture",
    "fmlit.flows.paths": "CondOTPath CosinePath GaussianPath PolynomialPath VPPath",
    "fmlit.flows.predictions": "Data Noise PreconditionedVelocity Prediction Score Velocity",
    "fmlit.flows.times": "LogitNormalTime TimeDistribution UniformTime",
    "fmlit.solvers.likelihood": "bits_per_dimension log_likelihood",
    "fmlit.models.compilation": "Execution",
    "fmlit.models.generative_model": "GenerativeModel",
    "fmlit.models.mlp": "MLP",
    "fmlit.models.unet": "UNet",
    "fmlit.sampling.generate": "sample",
    "fmlit.sampling.grids": "EDMGrid Grid LogitSNRGrid UniformGrid",
    "fmlit.sampling.samplers": "ChurnSampler ODESampler SDESampler Sampler",
    "fmlit.data.cifar10": "CIFAR10",
    "fmlit.data.data_module": "DataModule",
    "fmlit.data.digits": "Digits",
    "fmlit.data.image_folder": "ImageFolder",
    "fmlit.data.mnist": "MNIST",
    "fmlit.data.toys": "Checkerboard Moons TwoPoints",
    "fmlit.storage.loading": "load",
    "fmlit.metrics.dinov2": "DINOv2Features",
    "fmlit.metrics.features": "Features NetworkFeatures PixelFeatures",
    "fmlit.metrics.inception": "InceptionFeatures",
    "fmlit.training.averages": "EMA",
    "fmlit.training.callbacks.checkpoint": "Checkpoint",
    "fmlit.training.callbacks.quality_curve": "QualityCurve",
    "fmlit.training.callbacks.sample_grid": "SampleGrid",
    "fmlit.training.callbacks.training_log": "TrainingLog",
    "fmlit.training.draws": "TrainingDraws",
    "fmlit.training.loggers": "WandbLogger",
    "fmlit.training.modules": "FlowMatchingModule GenerativeModule ScoreMatchingModule",
    "fmlit.training.optimizers": "AdamW Muon OptimizerConfig TorchOptimizer",
    "fmlit.training.schedules": "LearningRateSchedule",
}
PUBLIC = {name: module for module, names in _HOMES.items() for name in names.split()}
FOLDERS = ("core", "flows", "solvers", "models", "sampling", "data", "metrics", "storage", "training", "evaluation")

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    if name in FOLDERS:
        return import_module(f"fmlit.{name}")
    raise AttributeError(f"module 'fmlit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC, *FOLDERS})


if TYPE_CHECKING:  # the same names, for editors and type checkers
    from fmlit.core.errors import UserError as UserError
    from fmlit.data.cifar10 import CIFAR10 as CIFAR10
    from fmlit.data.data_module import DataModule as DataModule
    from fmlit.data.digits import Digits as Digits
    from fmlit.data.image_folder import ImageFolder as ImageFolder
    from fmlit.data.mnist import MNIST as MNIST
    from fmlit.data.toys import Checkerboard as Checkerboard, Moons as Moons, TwoPoints as TwoPoints
    from fmlit.flows.couplings import (
        Coupling as Coupling,
        IndependentCoupling as IndependentCoupling,
        OptimalTransportCoupling as OptimalTransportCoupling,
    )
    from fmlit.flows.diffusions import (
        BetaDiffusion as BetaDiffusion,
        ConstantDiffusion as ConstantDiffusion,
        Diffusion as Diffusion,
        ReverseDiffusion as ReverseDiffusion,
    )
    from fmlit.flows.mixtures import GaussianMixture as GaussianMixture
    from fmlit.flows.paths import (
        CondOTPath as CondOTPath,
        CosinePath as CosinePath,
        GaussianPath as GaussianPath,
        PolynomialPath as PolynomialPath,
        VPPath as VPPath,
    )
    from fmlit.flows.predictions import (
        Data as Data,
        Noise as Noise,
        PreconditionedVelocity as PreconditionedVelocity,
        Prediction as Prediction,
        Score as Score,
        Velocity as Velocity,
    )
    from fmlit.flows.times import (
        LogitNormalTime as LogitNormalTime,
        TimeDistribution as TimeDistribution,
        UniformTime as UniformTime,
    )
    from fmlit.metrics.dinov2 import DINOv2Features as DINOv2Features
    from fmlit.metrics.features import (
        Features as Features,
        NetworkFeatures as NetworkFeatures,
        PixelFeatures as PixelFeatures,
    )
    from fmlit.metrics.inception import InceptionFeatures as InceptionFeatures
    from fmlit.models.compilation import Execution as Execution
    from fmlit.models.generative_model import GenerativeModel as GenerativeModel
    from fmlit.models.mlp import MLP as MLP
    from fmlit.models.unet import UNet as UNet
    from fmlit.sampling.generate import sample as sample
    from fmlit.sampling.grids import (
        EDMGrid as EDMGrid,
        Grid as Grid,
        LogitSNRGrid as LogitSNRGrid,
        UniformGrid as UniformGrid,
    )
    from fmlit.sampling.samplers import (
        ChurnSampler as ChurnSampler,
        ODESampler as ODESampler,
        Sampler as Sampler,
        SDESampler as SDESampler,
    )
    from fmlit.solvers.likelihood import bits_per_dimension as bits_per_dimension, log_likelihood as log_likelihood
    from fmlit.storage.loading import load as load
    from fmlit.training.averages import EMA as EMA
    from fmlit.training.callbacks.checkpoint import Checkpoint as Checkpoint
    from fmlit.training.callbacks.quality_curve import QualityCurve as QualityCurve
    from fmlit.training.callbacks.sample_grid import SampleGrid as SampleGrid
    from fmlit.training.callbacks.training_log import TrainingLog as TrainingLog
    from fmlit.training.draws import TrainingDraws as TrainingDraws
    from fmlit.training.loggers import WandbLogger as WandbLogger
    from fmlit.training.modules import (
        FlowMatchingModule as FlowMatchingModule,
        GenerativeModule as GenerativeModule,
        ScoreMatchingModule as ScoreMatchingModule,
    )
    from fmlit.training.optimizers import (
        AdamW as AdamW,
        Muon as Muon,
        OptimizerConfig as OptimizerConfig,
        TorchOptimizer as TorchOptimizer,
    )
    from fmlit.training.schedules import LearningRateSchedule as LearningRateSchedule
