import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from fmlit.core import randomness
from fmlit.core.randomness import image_noise, image_seeds, key, seed_layers, training_generator


def test_keys_are_the_same_in_every_process_and_release():
    assert key(7, 1024, "noise") == 1590394567287079149


@settings(max_examples=50)
@given(st.integers(0, 2**31 - 1), st.integers(0, 10**12), st.sampled_from(["time", "noise", "labels"]))
def test_keys_are_seeds_that_torch_accepts(seed, images_seen, stream):
    assert 0 <= key(seed, images_seen, stream) < 2**63


def test_streams_seeds_and_images_seen_each_change_the_draw():
    draws = [
        torch.randn(8, generator=training_generator(*arguments))
        for arguments in [(0, 0, "noise"), (0, 0, "time"), (0, 512, "noise"), (1, 0, "noise")]
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws[0], torch.randn(8, generator=training_generator(0, 0, "noise")))


def test_image_seeds_of_different_collections_are_distinct():
    seeds = torch.cat([image_seeds(seed, range(1000)) for seed in (0, 1, 2**31 - 1)])
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 3000
    assert torch.equal(image_seeds(1, torch.tensor([5, 3])), image_seeds(1, [5, 3]))


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=str(seed)):
        image_seeds(seed, [0])


def test_image_noise_depends_on_its_own_seed_only():
    seeds = image_seeds(0, range(6))
    together = image_noise(seeds, (3, 4, 4))
    assert together.shape == (6, 3, 4, 4)
    assert together.dtype == torch.float32
    assert torch.equal(image_noise(seeds[[4]], (3, 4, 4)), together[[4]])
    assert torch.equal(image_noise(seeds.flip(0), (3, 4, 4)), together.flip(0))
    assert image_noise(seeds[:0], (3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(("shape", "threads"), [((3, 4, 4), 1), ((300,), 1), ((300,), 3), ((), 1)])
def test_image_noise_is_that_of_a_generator_keyed_by_seed_and_purpose(shape, threads, monkeypatch):
    monkeypatch.setattr(randomness, "VALUES_PER_THREAD", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seeds = image_seeds(2**31 - 1, range(7))
    for seed, row in zip(seeds.tolist(), image_noise(seeds, shape, "sde", 4), strict=True):
        philox = np.random.Philox(key=np.array([seed, key(4, "sde")], dtype=np.uint64))
        drawn = np.random.Generator(philox).standard_normal(shape, dtype=np.float32)
        assert np.array_equal(row.numpy(), drawn)


def test_streams_and_steps_have_noise_of_their_own():
    seeds = image_seeds(3, range(2))
    draws = [image_noise(seeds, (5,), stream, step) for stream in ("init", "brownian") for step in (0, 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    assert len(torch.stack(draws).unique()) == 4 * 2 * 5


def test_image_noise_is_standard_normal_and_neighbouring_seeds_are_independent():
    noise = image_noise(image_seeds(0, range(2000)), (10,)).double()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = (noise[1:] * noise[:-1]).mean().item() * (1999 * 10) ** 0.5
    assert abs(correlation) < 4


def test_layers_draw_as_after_torchs_own_seed():
    torch.manual_seed(7)
    expected = torch.rand(5)
    torch.rand(3)
    seed_layers(7, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
