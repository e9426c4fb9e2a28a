"""Solvers as plain functions: ODEs (``ode``), few-step multistep ODEs on a path (``exponential``), SDEs (``sde``).

``SOLVERS`` holds one record per solver: its function, kind, order, cost and options.
"""

from fmlit.solvers.exponential import ddim, dpmpp_2m, dpmpp_3m, ipndm, unipc
from fmlit.solvers.ode import dopri5, euler, heun, midpoint, rk4
from fmlit.solvers.records import SOLVERS
from fmlit.solvers.sde import churn, euler_maruyama, stochastic_heun

__all__ = [
    "SOLVERS",
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
