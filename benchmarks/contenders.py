"""The contenders of training by name, and which of them can take part here."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from torch.utils.data import DataLoader

from benchmarks import loops, published
from benchmarks.workload import Workload
from fmlit.core.errors import UserError

INSTALL = "pip install -e '.[bench]'"
FMLIT, BARE = "fmlit", "bare"
Builder = Callable[[Workload], loops.Loop]


class Peer(NamedTuple):
    """A package, by the loop of its own example, a loop with our settings, and the data loader of its example."""

    published: Builder
    ours: Builder
    loader: Callable[[Workload], DataLoader]
    needed: dict[str, tuple[str, ...]]  # packages, by the variant that needs them

    @property
    def packages(self) -> list[str]:
        """Those that it needs and that are installed."""
        names = dict.fromkeys(package for packages in self.needed.values() for package in packages)
        return [name for name in names if find_spec(name) is not None]


PEERS = {
    "torchcfm": Peer(
        published.PublishedTorchCFM,
        loops.TorchCFMLoop,
        published.torchcfm_loader,
        {"published": ("torchcfm",), "ours": ("torchcfm",)},
    ),
    "flow_matching": Peer(
        published.PublishedFlowMatching,
        loops.FlowMatchingLoop,
        published.flow_matching_loader,
        {"published": ("flow_matching",), "ours": ("flow_matching",)},
    ),
    "diffusers": Peer(
        published.PublishedDiffusers,
        loops.DiffusersLoop,
        published.diffusers_loader,
        {"published": ("accelerate",), "ours": ()},
    ),
}
NO_PEERS = "none"


def check_peers(names: Sequence[str]) -> list[str]:
    """The peers of these names; ``none`` alone is an empty list.

    Raises:
        ValueError: there is no such peer.
    """
    if list(names) == [NO_PEERS]:
        return []
    for name in names:
        if name not in PEERS:
            raise UserError(f"peers: there is no {name}; choose from {', '.join(PEERS)}, or {NO_PEERS}")
    return list(dict.fromkeys(names))


def find_loops(peers: Sequence[str]) -> tuple[dict[str, Builder], dict[str, str]]:
    """What builds each loop, the bare one first, and the contenders that are left out, with the way to get them."""
    found: dict[str, Builder] = {BARE: loops.BareLoop}
    missing = {}
    for name in peers:
        for variant in ("published", "ours"):
            contender = f"{name}_{variant}"
            absent = [package for package in PEERS[name].needed[variant] if find_spec(package) is None]
            if absent:
                missing[contender] = f"{absent[0]} is not installed: {INSTALL}"
            else:
                found[contender] = getattr(PEERS[name], variant)
    return found, missing
