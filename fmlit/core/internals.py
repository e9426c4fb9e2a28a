"""Every private name of torch that fmlit touches, and one of Lightning's, each with the reason.

All were seen in torch 2.15 and Lightning 2.6. ``fmlit.training.lightning_internals`` is the same for the floors from
training upwards. A test fails where another module touches such a name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, in one kernel on a GPU. torch's optimizers use it; it has no public name."""
    torch._foreach_copy_(targets, sources)


def lerp_all(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """Move each target by the share ``weight`` towards its source, in one kernel on a GPU, as ``copy_all`` does."""
    torch._foreach_lerp_(targets, sources, weight)


def are_finite(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Whether all values are finite, as a bool on the device, in the way of torch's gradient scaler.

    It takes a third of the time of a norm, and is one kernel on a GPU.
    """
    found, scale = torch.zeros(1, device=device), torch.ones(1, device=device)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, scale)
    return found[0] == 0


def has_buffers(net: nn.Module) -> bool:
    """Whether a network has buffers, also those that are None until it runs, which ``net.buffers()`` leaves out."""
    return any(module._buffers for module in net.modules())


def compile_backward_early() -> None:
    """Compile the backward pass along with the forward pass, and not when it first runs.

    A failure there would end the training. Delete once torch does this by default.
    """
    import torch._functorch.config  # here, as it takes a while to import

    torch._functorch.config.force_non_lazy_backward_lowering = True


def is_compiled(net: nn.Module) -> bool:
    """Whether a network is what ``torch.compile`` returns, which saves its weights under other names."""
    return hasattr(net, "_orig_mod")


def is_compiler_error(error: Exception) -> bool:
    """Whether ``torch.compile`` failed, and not the network itself.

    Delete once torch exports the class of its errors.
    """
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def plain_call(net: nn.Module) -> Callable[..., Any]:
    """What a call of the network runs unless it is compiled: its hooks and ``forward``."""
    return net._call_impl


def replace_call(net: nn.Module, call: Callable[..., Any]) -> None:
    """Let calls of the network run ``call``, as ``net.compile()`` does, which offers no way out when it fails.

    Delete once ``torch.compile`` can fall back to the plain network for a compiler error alone.
    """
    net._compiled_call_impl = call


def replaces_sampler(trainer: Any) -> bool:
    """Whether Lightning would put a DistributedSampler in place of a data loader's own.

    Delete once the trainer keeps ``use_distributed_sampler`` as a public attribute.
    """
    return trainer._accelerator_connector.use_distributed_sampler


def worker_processes(batches: Any) -> list[Any]:
    """The worker processes behind an iterator of a ``DataLoader``. torch 2.15 has no public name for them."""
    return list(batches._workers)
