from itertools import permutations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fmlit.flows.couplings import IndependentCoupling, OptimalTransportCoupling, transport_cost


def draw(n, shape=(3, 4, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, *shape, dtype=torch.float64, generator=g)


def rows(x):
    return sorted(x.flatten(1).tolist())


def test_transport_cost_is_the_mean_squared_distance():
    z, eps = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert transport_cost(z, eps).item() == (25 + 1) / 2


def test_independent_coupling_leaves_noise_as_drawn():
    z, eps = draw(6)
    assert IndependentCoupling()(z, eps) is eps


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([(2,), (3, 2, 2), (4, 3)]))
def test_assignment_is_the_best_of_all_permutations(seed, shape):
    z, eps = draw(5, shape, seed)
    best = min(transport_cost(z, eps[list(order)]).item() for order in permutations(range(5)))
    coupled = OptimalTransportCoupling(5)(z, eps)
    assert transport_cost(z, coupled).item() == pytest.approx(best, rel=1e-12)


def test_in_one_dimension_the_assignment_sorts():
    z, eps = draw(200, (1,))
    coupled = OptimalTransportCoupling(200)(z, eps)
    assert torch.equal(coupled[z.squeeze(1).argsort()], eps.sort(dim=0).values)


def test_a_hidden_pairing_is_found():
    z, _ = draw(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(OptimalTransportCoupling(64)(z, z[order]), z)


@pytest.mark.parametrize("group_size", [2, 7, 32, 100])
def test_noise_is_reordered_within_its_group_and_none_is_lost(group_size):
    z, eps = draw(40)
    coupled = OptimalTransportCoupling(group_size)(z, eps)
    for group, original in zip(coupled.split(group_size), eps.split(group_size), strict=True):
        assert rows(group) == rows(original)
    assert transport_cost(z, coupled) < transport_cost(z, eps)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_of_whole_groups_give_the_pairs_of_the_global_batch(ranks):
    z, eps = draw(32)
    labels = torch.arange(32) % 3
    coupling = OptimalTransportCoupling(8)
    slices = zip(z.chunk(ranks), eps.chunk(ranks), labels.chunk(ranks), strict=True)
    assert torch.equal(torch.cat([coupling(*each) for each in slices]), coupling(z, eps, labels))


def test_larger_groups_cost_less():
    z, eps = draw(128, (8,))
    costs = [transport_cost(z, OptimalTransportCoupling(size)(z, eps)).item() for size in (2, 8, 32, 128)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.8 * costs[0]


def test_noise_does_not_learn_the_class():
    """Each class keeps the noise that it was dealt; across classes the plan would tell the class from the noise."""
    z, eps = draw(60, (4,))
    labels = torch.arange(60) % 3
    z += 4 * labels[:, None]
    coupled = OptimalTransportCoupling(30)(z, eps, labels)
    for kind in range(3):
        assert rows(coupled[labels == kind]) == rows(eps[labels == kind])
        members = labels[:30] == kind  # and the plan inside a class is the best one
        alone = OptimalTransportCoupling(10)(z[:30][members], eps[:30][members])
        assert torch.equal(coupled[:30][members], alone)
    across = OptimalTransportCoupling(30, within_class=False)(z, eps, labels)
    assert torch.equal(across, OptimalTransportCoupling(30)(z, eps))
    assert across[labels == 2].mean() > across[labels == 0].mean() + 0.5
    assert (coupled[labels == 2].mean() - coupled[labels == 0].mean()).abs() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_type_is_kept(dtype):
    z, eps = draw(16)
    assert OptimalTransportCoupling(16)(z.to(dtype), eps.to(dtype)).dtype == dtype


def test_mixed_precision_does_not_reach_the_costs():
    z, eps = draw(64).float()
    expected = OptimalTransportCoupling(64)(z, eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert (z.flatten(1) @ eps.flatten(1).T).dtype == torch.bfloat16  # what the coupling has to avoid
        assert torch.equal(OptimalTransportCoupling(64)(z, eps), expected)


@pytest.mark.parametrize("size", [1, 0, -4])
def test_a_group_of_one_is_refused(size):
    with pytest.raises(ValueError, match=f"group_size must be at least 2, got {size}"):
        OptimalTransportCoupling(size)


def test_too_large_a_group_is_refused_with_the_memory_that_it_needs():
    with pytest.raises(ValueError, match=r"group_size 50000 needs 18\.6 GiB"):
        OptimalTransportCoupling(50_000)


def test_shapes_that_do_not_match_are_named():
    z, eps = draw(4, (2,))
    with pytest.raises(ValueError, match=r"got \(4, 2\) and \(3, 2\)"):
        OptimalTransportCoupling(4)(z, eps[:3])
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(3,\)"):
        OptimalTransportCoupling(4)(z, eps, torch.zeros(3))


@pytest.mark.parametrize(("share", "same"), [(12, True), (24, True), (6, False), (18, False)])
def test_slices_that_are_whole_groups_keep_the_pairs(share, same):
    coupling = OptimalTransportCoupling(12)
    assert coupling.keeps_pairs(share) is same
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 72, 3, generator=generator)
    parts = [coupling(*slices) for slices in zip(z.split(share), eps.split(share), strict=True)]
    assert torch.equal(torch.cat(parts), coupling(z, eps)) is same
    assert OptimalTransportCoupling(12, across_ranks=True).keeps_pairs(share)
    assert IndependentCoupling().keeps_pairs(share)
