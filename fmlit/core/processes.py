"""What metrics exchange between processes: sums and rows, right for unequal counts and for ranks that hold nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fmlit.core.errors import from_rank, kind_of

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a computation. All of them must call each method, in the same order.

    ``ProcessGroup()`` is one process on its own, which exchanges nothing. It also serves for work that one rank of a
    group does alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None  # a torch process group; None is the default one

    @staticmethod
    def current(group: Any = None) -> "ProcessGroup":
        """All processes of the (default) process group, or this one where torch.distributed is not initialized."""
        if not (dist.is_available() and dist.is_initialized()):
            return ProcessGroup()
        return ProcessGroup(dist.get_rank(group), dist.get_world_size(group), group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of tensors of one shape and type, on the device of this rank's own."""
        if self.size == 1:
            return tensor
        total = tensor.to("cpu" if "gloo" in dist.get_backend(self.group) else "cuda", copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order: for small things."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (n_r, *shape) of all ranks below each other, in rank order. n_r may differ and may be 0."""
        if self.size == 1:
            return rows
        parts = self.gather_objects(rows.cpu())
        filled = [part for part in parts if len(part)]  # a rank without rows does not know their shape
        return torch.cat(filled or parts[:1]).to(rows.device)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """An exception on one rank inside the block ends it on all, instead of leaving the others in a collective.

        Raises:
            UserError: on the ranks that did not fail, where another rank raised a UserError or misses a file; the
                message names that rank and why.
            RuntimeError: the same, for any other error; a lost lease stays one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        reports = self.gather_objects(None if failure is None else (str(failure), kind_of(failure)))
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                raise from_rank(rank, *report)

    def from_first(self, produce: Callable[[], T]) -> T:
        """What ``produce()`` returns on rank 0, on every rank."""
        value: list[Any] = [None]
        with self.fail_together():
            if self.rank == 0:
                value[0] = produce()
        if self.size > 1:
            dist.broadcast_object_list(value, src=dist.get_global_rank(self.group, 0) if self.group else 0)
        return value[0]
