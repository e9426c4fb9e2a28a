"""The training stream: one global order for any number of processes, and where a resumed run picks it up."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from fmlit import DataModule, TwoPoints
from fmlit.data.stores import InMemoryDataset
from fmlit.data.order import GlobalBatchSampler, RankSlice, TrainingOrder


class Numbered(DataModule):
    """Ten images, recognisable by their label, and by their left column: its pixels are 1, the others 0."""

    shape = (1, 2, 3)

    def __init__(self, batch_size=12, seed=0, horizontal_flip=True, length=10):
        super().__init__(batch_size, seed)
        self.horizontal_flip = horizontal_flip
        self.length = length

    def load(self, split):
        images = torch.zeros(self.length, 1, 2, 3, dtype=torch.uint8)
        images[..., 0] = 1
        return InMemoryDataset(images, torch.arange(self.length))


def as_rank(data, rank=0, world_size=1, accumulated=1, images_seen=0):
    """The data module as Lightning would hand it to one process."""
    data.trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulated,
        lightning_module=SimpleNamespace(images_seen=images_seen),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    return data


def global_stream(world_size, accumulated, steps, images_seen=0, **arguments):
    """(labels, flipped) of the images of ``steps`` optimizer steps, in the order of the stream."""
    loaders = [
        as_rank(Numbered(**arguments), rank, world_size, accumulated, images_seen).train_dataloader()
        for rank in range(world_size)
    ]
    labels, flipped = [], []
    for batches in islice(zip(*loaders, strict=True), steps * accumulated):
        for batch in batches:
            labels += batch["labels"].tolist()
            flipped += batch["data"][:, 0, 0, 2].bool().tolist()
    return labels, flipped


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 30), st.integers(-5, 5))
def test_every_epoch_holds_every_image_once(length, start, count, seed):
    whole = TrainingOrder(length, seed).indices(0, 7 * length).reshape(7, length)
    assert (whole.sort(dim=1).values == torch.arange(length)).all()
    longer = TrainingOrder(length, seed).indices(0, start + count)
    assert torch.equal(TrainingOrder(length, seed).indices(start, count), longer[start:])


def test_epochs_and_seeds_are_shuffled_differently():
    epochs = TrainingOrder(100, seed=0).indices(0, 300).reshape(3, 100)
    other = TrainingOrder(100, seed=1).indices(0, 100)
    assert len({tuple(epoch) for epoch in [*epochs.tolist(), other.tolist(), range(100)]}) == 5


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_global_order_is_the_same_for_any_division_of_the_work(world_size, accumulated):
    labels, _ = global_stream(world_size, accumulated, steps=5)
    assert labels == TrainingOrder(10, seed=0).indices(0, 60).tolist()
    assert all(sorted(labels[start : start + 10]) == list(range(10)) for start in range(0, 60, 10))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_same_images_are_flipped_whatever_the_world_size(accumulated):
    alone = global_stream(1, accumulated, steps=20)
    assert alone == global_stream(2, accumulated, steps=20) == global_stream(3, accumulated, steps=20)
    assert 90 < sum(alone[1]) < 150  # of 240
    assert not any(global_stream(2, accumulated, steps=20, horizontal_flip=False)[1])
    assert alone != global_stream(1, accumulated, steps=20, seed=1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_rest(world_size):
    labels, flipped = global_stream(world_size, 2, steps=6)
    rest = global_stream(world_size, 2, steps=3, images_seen=36)
    assert rest == (labels[36:], flipped[36:])


def test_batches_larger_than_the_data_set():
    labels, _ = global_stream(2, 1, steps=3, batch_size=8, length=3)
    assert all(sorted(labels[start : start + 3]) == [0, 1, 2] for start in range(0, 24, 3))


def test_a_second_iteration_asks_again_where_training_stands():
    position = 0
    sampler = GlobalBatchSampler(TrainingOrder(10, 0), RankSlice(4, 0, 1), False, lambda: position)
    assert next(iter(sampler)) == next(iter(sampler))
    position = 4
    assert next(iter(sampler)) == [(index, False) for index in TrainingOrder(10, 0).indices(4, 4).tolist()]


def test_batches_have_the_promised_types_and_images_become_floats_on_the_device():
    data = Numbered(batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["data"].shape == (4, 1, 2, 3)
    assert batch["data"].dtype == torch.uint8
    assert batch["labels"].dtype == torch.int64
    moved = data.on_after_batch_transfer(batch, 0)
    assert moved["data"].dtype == torch.float32
    assert moved["data"].unique().tolist() == pytest.approx([-1.0, 1 / 127.5 - 1])
    assert moved["labels"] is batch["labels"]
    vectors = next(iter(TwoPoints(batch_size=4).train_dataloader()))
    assert TwoPoints().on_after_batch_transfer(vectors, 0)["data"] is vectors["data"]


def test_loading_takes_nothing_from_the_global_random_numbers():
    data = Numbered()
    before = torch.get_rng_state()
    list(islice(data.train_dataloader(), 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulated", "choices"),
    [(10, 4, 1, "choose 8 or 12"), (10, 2, 2, "choose 8 or 12"), (3, 4, 2, "choose 8")],
)
def test_a_batch_that_does_not_divide_names_its_neighbours(batch_size, world_size, accumulated, choices):
    data = as_rank(Numbered(batch_size), 0, world_size, accumulated)
    with pytest.raises(ValueError, match=f"batch_size {batch_size} is not divisible by .*: {choices}$"):
        data.train_dataloader()


def test_lightnings_own_sampler_is_refused():
    data = Numbered()
    data.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"Trainer\(use_distributed_sampler=False\)"):
        data.train_dataloader()
    data.trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    assert len(next(iter(data.train_dataloader()))["labels"]) == 6


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_must_be_positive(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        Numbered(batch_size)


def test_split_must_exist():
    with pytest.raises(ValueError, match="'val'"):
        Numbered().dataset("val")  # type: ignore[arg-type]


class Recorder(LightningModule):
    """Counts images as a training module does, and notes which ones it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images_seen = 0
        self.labels = []

    def training_step(self, batch, batch_idx):
        assert batch["data"].dtype == torch.float32
        self.labels += batch["labels"].tolist()
        self.images_seen += len(batch["labels"])
        return self.weight.square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint):
        self.images_seen = checkpoint["images_seen"]


def fit(folder, ckpt_path=None, **arguments):
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, Numbered(batch_size=4), ckpt_path=ckpt_path)
    return trainer, module.labels


def test_lightning_resumes_and_starts_epochs_where_training_stands(tmp_path):
    order = TrainingOrder(10, 0).indices(0, 28).tolist()
    trainer, labels = fit(tmp_path, max_steps=3)
    assert labels == order[:12]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, rest = fit(tmp_path, max_steps=7, ckpt_path=tmp_path / "last.ckpt")
    assert rest == order[12:]
    _, labels = fit(tmp_path, max_epochs=3, limit_train_batches=2)
    assert labels == order[:24]
