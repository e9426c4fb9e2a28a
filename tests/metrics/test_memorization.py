"""Samples that are copies of training items are found, in any units."""

import pytest
import torch

from fmlit.metrics.memorization import memorization


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_copy_lies_within_a_third_of_the_second_distance(scale):
    training = float64([0.0, 0.0], [4.0, 0.0], [100.0, 0.0])
    samples = float64([0.9, 0.0], [1.1, 0.0], [100.0, 1.0], [2.0, 0.0])
    found = memorization(scale * samples, scale * training)
    assert found.copied.tolist() == [True, False, True, False]
    assert found.nearest[:3].tolist() == [0, 0, 2]
    assert torch.allclose(found.distances, scale * float64(0.9, 1.1, 1.0, 2.0))
    assert found.verdict == "no memorization: 50% of the samples are copies"
    assert found.share == 0.5
