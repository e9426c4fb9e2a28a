import pytest
import torch

from fmlit.core.tensors import expand_time, from_uint8, to_uint8


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4), (2, 4, 4, 3), (7, 3)])
def test_time_multiplies_each_sample_and_nothing_else(shape):
    x = torch.ones(4, *shape)
    t = torch.arange(4.0)
    scaled = expand_time(t, x) * x
    assert scaled.shape == x.shape
    for i in range(4):
        assert (scaled[i] == i).all()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_time_of_another_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"shape \(4,\) for x of shape \(4, 2\)"):
        expand_time(torch.zeros(shape), torch.zeros(4, 2))


def test_every_gray_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = from_uint8(levels)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_uint8(images), levels)
    assert torch.equal(to_uint8(images.double()), levels)


def test_values_outside_the_range_are_clamped_not_wrapped():
    assert to_uint8(torch.tensor([-3.0, -1.001, 1.001, 3.0])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_images_are_refused(value):
    images = torch.zeros(2, 3)
    images[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(images)


def test_only_uint8_is_read_as_gray_levels():
    with pytest.raises(ValueError, match="float32"):
        from_uint8(torch.zeros(2))


def test_gray_levels_are_not_taken_for_images():
    with pytest.raises(ValueError, match=r"as floating-point numbers, got torch\.uint8"):
        to_uint8(torch.tensor([0, 255], dtype=torch.uint8))
