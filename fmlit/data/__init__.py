"""Data sets, each a LightningDataModule that deals one global stream of batches to all ranks."""

from fmlit.data.cifar10 import CIFAR10
from fmlit.data.data_module import DataModule
from fmlit.data.digits import Digits
from fmlit.data.image_folder import ImageFolder
from fmlit.data.mnist import MNIST
from fmlit.data.toys import Checkerboard, Moons, TwoPoints

__all__ = ["CIFAR10", "MNIST", "Checkerboard", "DataModule", "Digits", "ImageFolder", "Moons", "TwoPoints"]
