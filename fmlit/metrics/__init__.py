"""Metrics of generated images: a stream of uint8 images in, numbers that state their protocol out::

quality = ImageQuality(InceptionFeatures(), reference)           # reference_statistics(...) of the real images
for images in stream: quality.update(images)
scores = quality.reduce().compute()                              # {"fid_50k": ..., "kid_10k": ...}
"""

from fmlit.metrics.class_accuracy import ClassReader
from fmlit.metrics.cost import Cost
from fmlit.metrics.dinov2 import DINOv2Features
from fmlit.metrics.features import Features, NetworkFeatures, PixelFeatures
from fmlit.metrics.frechet import GaussianStatistics, frechet_distance
from fmlit.metrics.image_quality import ImageQuality
from fmlit.metrics.inception import InceptionFeatures
from fmlit.metrics.kernel import kernel_distance
from fmlit.metrics.precision_recall import nearest_neighbors, precision_recall
from fmlit.metrics.protocol import Protocol
from fmlit.metrics.reference import Reference, reference_statistics

__all__ = [
    "ClassReader",
    "Cost",
    "DINOv2Features",
    "Features",
    "GaussianStatistics",
    "ImageQuality",
    "InceptionFeatures",
    "NetworkFeatures",
    "PixelFeatures",
    "Protocol",
    "Reference",
    "frechet_distance",
    "kernel_distance",
    "nearest_neighbors",
    "precision_recall",
    "reference_statistics",
]
