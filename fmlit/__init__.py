"""fmlit: flow matching and score-based diffusion for image generation, on PyTorch Lightning."""

__version__ = "0.1.0"
