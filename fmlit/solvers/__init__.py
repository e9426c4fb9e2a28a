"""Solvers as plain functions: ODEs (``ode``), few-step multistep ODEs on a path (``exponential``), SDEs (``sde``)."""

from fmlit.solvers.exponential import ddim, dpmpp_2m, dpmpp_3m, ipndm, unipc
from fmlit.solvers.ode import dopri5, euler, heun, midpoint, rk4
from fmlit.solvers.sde import churn, euler_maruyama, stochastic_heun

__all__ = [
    "churn",
    "ddim",
    "dopri5",
    "dpmpp_2m",
    "dpmpp_3m",
    "euler",
    "euler_maruyama",
    "heun",
    "ipndm",
    "midpoint",
    "rk4",
    "stochastic_heun",
    "unipc",
]
