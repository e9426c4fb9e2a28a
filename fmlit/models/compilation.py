"""``torch.compile`` for a network, in place: its parameters keep their names, and a failure ends in plain PyTorch."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fmlit.core.errors import UserError
from fmlit.core.internals import compile_backward_early, is_compiler_error, plain_call, replace_call

log = logging.getLogger(__name__)

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class Execution:
    """How a network runs. The results are the same up to rounding.

    Args:
        channels_last: keep kernels and activations in the channels-last memory format, which suits GPUs.
        compile: mode of ``torch.compile`` for the network; null runs it without the compiler.
    """

    channels_last: bool = False
    compile: CompileMode | None = None

    def set_memory_format(self, net: nn.Module) -> None:
        """Put the network's kernels into the chosen memory format.

        Raises:
            UserError: the network has kernels of three dimensions, and channels_last is for images.
        """
        if not self.channels_last:
            return
        if any(p.ndim == 5 for p in net.parameters()):
            raise UserError("model.execution.channels_last is for images; this network has kernels of three dimensions")
        net.to(memory_format=torch.channels_last)

    def compile_net(self, net: nn.Module) -> None:
        """Compile the network in place, if a mode is given."""
        if self.compile:
            compile_net(net, self.compile)


def compile_net(net: nn.Module, mode: CompileMode) -> None:
    """Compile what calls to ``net`` run, for static shapes: each new batch size is compiled anew, once.

    Copies of the network share the compiled code, but a copy made by ``deepcopy`` runs plainly until it is compiled,
    too. Where the compiler fails (no C++ compiler or Triton, an operation that it does not know), one line says so and
    the network runs plainly from then on.

    Args:
        net: the network; compiling is put off to its first call.
        mode: of ``torch.compile``; "reduce-overhead" and "max-autotune" use CUDA graphs.
    """
    compile_backward_early()
    # diffusers asks for torch's version behind a cache, which compiled code may do without.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    # On a machine without a GPU, it warns that it found no CUDA runtime.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    plain, failed = plain_call(net), False
    compiled = torch.compile(plain, mode=mode, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                output = compiled(*args, **kwargs)
                # A CUDA graph writes every output into the same memory, and solvers keep earlier ones.
                return output.clone() if mode in CUDA_GRAPHS else output
            except Exception as error:
                if not is_compiler_error(error):
                    raise
                failed = True
                reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
                log.warning("torch.compile failed (%s: %s); going on without it", type(error).__name__, reason)
        return plain(*args, **kwargs)

    replace_call(net, call)
