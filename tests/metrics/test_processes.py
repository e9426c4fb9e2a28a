"""Metrics over several processes: the numbers of one process, whatever their number and their shares."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.metrics import GaussianStatistics, ImageQuality, PixelFeatures, reference_statistics

N, BATCH = 1001, 64


def pictures(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=g)


class Real(torch.utils.data.Dataset):
    """130 labelled pictures; ``broken`` cannot be read, and raises an error of some kind."""

    def __init__(self, broken: int | None = None, kind: type[Exception] = UserError) -> None:
        self.images, self.broken, self.kind = pictures(130, 1), broken, kind

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        if index == self.broken:
            raise self.kind(f"picture {index} is broken")
        return self.images[index], 0


def reference(cache: Path):
    with mock.patch("fmlit.metrics.reference.KEPT", 50):
        return reference_statistics(Real(), "abc", PixelFeatures(), "train", cache, batch_size=16)


def score(ranks: ProcessGroup, cache: Path, n: int = N) -> dict:
    """Whole batches of n generated images are dealt to ranks, as sampling does."""
    quality = ImageQuality(PixelFeatures(), reference(cache), ("fid", "kid", "precision", "recall"))
    for batch in pictures(n, 2).split(BATCH)[ranks.rank :: ranks.size]:
        quality.update(batch)
    quality.reduce()
    return {"count": quality.count, "digest": quality.digest, **quality.compute()}


def check(cache: Path) -> dict:
    """Everything that the processes are asked; runs on each of them."""
    ranks = ProcessGroup.current()
    found = {"all": score(ranks, cache), "first": score(ranks, cache, n=BATCH)}  # the second: for rank 0 alone
    rows = torch.arange(3 * ranks.rank)[:, None] + 100 * ranks.rank  # 0, 3, 6 rows
    found["rows"] = ranks.gather_rows(rows if ranks.rank else torch.empty(0, 0, dtype=torch.int64)).flatten().tolist()
    empty = GaussianStatistics().reduce(ProcessGroup.current())
    found["empty"] = (empty.count, empty.dimension)
    for kind in (UserError, FileNotFoundError, ValueError, OSError):
        try:
            reference_statistics(Real(17, kind), kind.__name__, PixelFeatures(), "train", cache, batch_size=16)
        except Exception as error:
            found[kind.__name__] = (type(error).__name__, str(error))
    kept = reference(cache)
    return {**found, "reference": (kept.mean, kept.covariance, kept.features, kept.indices)}


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(check(Path(folder) / "cache"), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    cache = tmp_path_factory.mktemp("alone")
    return {
        "all": score(ProcessGroup(), cache),
        "first": score(ProcessGroup(), cache, BATCH),
        "reference": reference(cache),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_find_what_one_finds(size, alone, tmp_path):
    mp.spawn(worker, args=(size, str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(size)]
    assert alone["all"]["count"] == N
    for rank, result in enumerate(found):
        for part in ("all", "first"):
            assert result[part]["digest"] == alone[part]["digest"]  # the same set of images
            numbers = [{k: v for k, v in each[part].items() if k != "digest"} for each in (result, alone)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)
        mean, covariance, features, indices = result["reference"]
        torch.testing.assert_close(mean, alone["reference"].mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(covariance, alone["reference"].covariance, rtol=1e-12, atol=1e-14)
        assert torch.equal(features, alone["reference"].features)
        assert torch.equal(indices, alone["reference"].indices)
        assert result["rows"] == [100 * r + i for r in range(size) for i in range(3 * r)]
        assert result["empty"] == (0, 0)
        # images 16 to 31 are the second batch: rank 1 meets the broken one, and all of them say so
        for kind in ("UserError", "FileNotFoundError", "ValueError", "OSError"):
            elsewhere = "UserError" if kind in ("UserError", "FileNotFoundError") else "RuntimeError"
            here = rank == 1
            assert result[kind] == (
                (kind, "picture 17 is broken") if here else (elsewhere, "rank 1: picture 17 is broken")
            )
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_one_process_exchanges_nothing():
    ranks = ProcessGroup.current()
    assert (ranks.rank, ranks.size) == (0, 1)
    rows = torch.arange(6).reshape(3, 2)
    assert torch.equal(ranks.gather_rows(rows), rows)
    assert torch.equal(ranks.sum(rows), rows)
    assert ranks.from_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError), ranks.fail_together():
        1 / 0  # noqa: B018
