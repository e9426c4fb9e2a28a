"""Metrics of generated images: a stream of uint8 images in, numbers that state their protocol out::

quality = ImageQuality(InceptionFeatures(), reference)           # reference_statistics(...) of the real images
for images in stream: quality.update(images)
scores = quality.reduce().compute()                              # {"fid_50k": ..., "kid_10k": ...}
"""

from fmlit.metrics.class_accuracy import ClassReader as ClassReader
from fmlit.metrics.cost import Cost as Cost
from fmlit.metrics.dinov2 import DINOv2Features as DINOv2Features
from fmlit.metrics.features import (
    Features as Features,
    NetworkFeatures as NetworkFeatures,
    PixelFeatures as PixelFeatures,
)
from fmlit.metrics.frechet import GaussianStatistics as GaussianStatistics, frechet_distance as frechet_distance
from fmlit.metrics.image_quality import ImageQuality as ImageQuality
from fmlit.metrics.inception import InceptionFeatures as InceptionFeatures
from fmlit.metrics.kernel import kernel_distance as kernel_distance
from fmlit.metrics.precision_recall import nearest_neighbors as nearest_neighbors, precision_recall as precision_recall
from fmlit.metrics.protocol import Protocol as Protocol
from fmlit.metrics.reference import Reference as Reference, reference_statistics as reference_statistics
from fmlit.metrics.reference_file import ReferenceFile as ReferenceFile
