"""The two training objectives: conditional flow matching and denoising score matching, each one weighted regression.

Both take a field, a path and the draws (z, eps, t), and return one loss per sample (B,), averaged over dimensions.
"""

from torch import Tensor

from fmlit.core.tensors import Field, check_like, expand_time
from fmlit.flows.paths import GaussianPath


def flow_matching_loss(
    velocity: Field, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Conditional flow matching: ``w(t) |u_theta(x_t, t) - u_t(x_t | z)|^2`` with ``x_t = alpha z + beta eps``.

    Its gradient is that of the regression on the marginal velocity (Lipman et al. 2023, theorem 2), which is never
    needed. Shapes: z, eps (B, *shape), t and weight (B,). Returns (B,). Raises UserError for other shapes.
    """
    u = velocity(path.sample(z, eps, t), t)
    check_like(u, z, "the velocity and z")
    return _weighted_mean_square(u - path.velocity(z, eps, t), weight)


def score_matching_loss(
    score: Field, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Denoising score matching: ``w(t) beta^2 |s_theta(x_t, t) + eps / beta|^2``, as ``w(t) |beta s_theta + eps|^2``.

    The bare ``|s + eps / beta|^2`` has the variance 1 / beta^2, so that times near data would drown all others; the
    factor beta^2 (Song & Ermon 2019, section 4.2) gives every time the same scale. With ``s = -eps_theta / beta`` it is
    DDPM's ``|eps_theta - eps|^2``. Shapes: z, eps (B, *shape), t and weight (B,). Returns (B,). Raises UserError for
    other shapes.
    """
    s = score(path.sample(z, eps, t), t)
    check_like(s, eps, "the score and eps")
    return _weighted_mean_square(expand_time(path.beta(t), eps) * s + eps, weight)


def _weighted_mean_square(residual: Tensor, weight: Tensor | None) -> Tensor:
    loss = residual.square().flatten(1).mean(1)
    if weight is None:
        return loss
    check_like(weight, loss, "weight and t")
    return weight * loss
