"""Data on the training device: the same batches as from host memory, and host memory where they do not fit."""

from itertools import islice

import pytest
import torch
from lightning.pytorch import seed_everything
from tests.helpers.small_runs import digits_module, fit, same, weights

import fmlit.data.data_module
import fmlit.data.resident
from fmlit import Digits, TwoPoints
from fmlit.data.stores import InMemoryDataset, TrainingView
from fmlit.data.resident import ResidentDataset, resident

CPU = torch.device("cpu")


@pytest.fixture
def on_device(monkeypatch):
    """As if the CPU were an accelerator."""
    monkeypatch.setattr(fmlit.data.data_module, "resident", ResidentDataset)


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (5,)], ids=str)
def test_the_same_batch_as_from_host_memory(shape):
    data = torch.randint(256, (20, *shape)).to(torch.uint8)
    dataset = InMemoryDataset(data, torch.arange(20))
    items = [(int(row), bool(row % 3 == 0) and len(shape) == 3) for row in torch.randint(20, (12,))]
    kept = ResidentDataset(dataset, CPU)
    batch, wanted = kept.take(kept.__getitems__(items)), TrainingView(dataset).__getitems__(items)
    assert torch.equal(batch["data"], wanted["data"])
    assert torch.equal(batch["labels"], wanted["labels"])
    assert torch.equal(dataset.data, data)  # nothing was flipped in place


@pytest.mark.parametrize("module", [Digits, TwoPoints])
def test_only_row_numbers_travel(module, on_device):
    data = module(batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"rows", "flips"}
    assert batch["rows"].shape == (8,)
    ready = data.on_after_batch_transfer(batch, 0)
    assert ready["data"].dtype == torch.float32
    assert ready["data"].shape == (8, *data.shape)
    again = next(iter(module(batch_size=8).train_dataloader()))
    assert torch.equal(again["rows"], batch["rows"])


def test_training_does_not_depend_on_where_the_data_lie(tmp_path, monkeypatch):
    trained = []
    for place in (resident, ResidentDataset):
        monkeypatch.setattr(fmlit.data.data_module, "resident", place)
        seed_everything(0)
        module = digits_module()
        fit(module, tmp_path, 3)
        trained.append(weights(module))
    assert same(*trained)


def test_rows_from_the_middle_of_the_stream(on_device):
    rows = [batch["rows"] for batch in islice(Digits(batch_size=8).train_dataloader(), 3)]
    assert len(torch.cat(rows).unique()) == 24


def test_host_memory_where_there_is_no_accelerator_or_no_room(monkeypatch, recwarn):
    dataset = InMemoryDataset(torch.zeros(100, 1, 10, 10, dtype=torch.uint8))
    assert resident(dataset, CPU) is None
    assert not recwarn
    monkeypatch.setattr(fmlit.data.resident, "_free_memory", lambda device: 40_000.0)
    with pytest.warns(UserWarning, match="stay in host memory: more than a quarter"):
        assert resident(dataset, torch.device("cuda")) is None
    assert resident(TrainingView(dataset), torch.device("cuda")) is None  # items that are read from files


def test_room_is_asked_for_before_it_is_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(fmlit.data.resident, "_free_memory", lambda device: 4 * 10_800.0)
    monkeypatch.setattr(fmlit.data.resident, "ResidentDataset", lambda dataset, device: taken.append(device))
    dataset = InMemoryDataset(torch.zeros(100, 1, 10, 10, dtype=torch.uint8))  # 10,000 bytes, and 800 of labels
    resident(dataset, torch.device("cuda"))
    assert taken == [torch.device("cuda")]
