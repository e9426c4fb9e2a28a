"""Solvers as plain functions: ODEs (``ode``), few-step multistep ODEs on a path (``exponential``), SDEs (``sde``).

``SOLVERS`` holds one record per solver: its function, kind, order, cost and options.
"""

from fmlit.solvers.exponential import ddim as ddim
from fmlit.solvers.exponential import dpmpp_2m as dpmpp_2m
from fmlit.solvers.exponential import dpmpp_3m as dpmpp_3m
from fmlit.solvers.exponential import ipndm as ipndm
from fmlit.solvers.exponential import unipc as unipc
from fmlit.solvers.ode import dopri5 as dopri5
from fmlit.solvers.ode import euler as euler
from fmlit.solvers.ode import heun as heun
from fmlit.solvers.ode import midpoint as midpoint
from fmlit.solvers.ode import rk4 as rk4
from fmlit.solvers.records import SOLVERS as SOLVERS
from fmlit.solvers.sde import churn as churn
from fmlit.solvers.sde import euler_maruyama as euler_maruyama
from fmlit.solvers.sde import stochastic_heun as stochastic_heun
