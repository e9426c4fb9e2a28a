"""Solvers as plain functions: ODEs (``ode``), few-step multistep ODEs on a path (``exponential``), SDEs (``sde``).

``SOLVERS`` holds one record per solver: its function, kind, order, cost and options.
"""

from fmlit.solvers.exponential import (
    ddim as ddim,
    dpmpp_2m as dpmpp_2m,
    dpmpp_3m as dpmpp_3m,
    ipndm as ipndm,
    unipc as unipc,
)
from fmlit.solvers.ode import dopri5 as dopri5, euler as euler, heun as heun, midpoint as midpoint, rk4 as rk4
from fmlit.solvers.records import SOLVERS as SOLVERS
from fmlit.solvers.sde import churn as churn, euler_maruyama as euler_maruyama, stochastic_heun as stochastic_heun
