"""What the parts of a run share, in a plain Trainer as in the command line's."""

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from fmlit import Digits
from fmlit.sampling.samplers import ODESampler
from fmlit.storage.run_folder import RunFolder
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, ProgressBar, QualityCurve, SampleGrid, TrainingLog
from tests.helpers.small_runs import Memory, digits_module, fit, names, same, weights


def test_a_plain_trainer_in_a_notebook_needs_nothing_else(tmp_path):
    grid, checkpoints, ema = SampleGrid(24, ODESampler("euler", 2), columns=1), Checkpoint(24), EMA()
    callbacks = [grid, checkpoints, TrainingLog(), ProgressBar(), ema]
    module = digits_module()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=4, max_epochs=-1, default_root_dir=tmp_path, callbacks=callbacks
    )
    trainer.fit(module, Digits(batch_size=12))
    run = module.run
    assert run.folder == RunFolder(tmp_path)
    assert names(run.folder.samples, "*.png") == ["000000024.png", "000000048.png"]
    assert run.folder.last.exists()
    assert (run.averages, run.checkpoints) == (ema, checkpoints)
    assert run.latest["loss"] > 0
    assert run.pause_seconds == pytest.approx(grid.seconds + checkpoints.seconds)


def test_each_trainer_has_a_context_of_its_own(tmp_path):
    module = digits_module()
    alone = module.run
    assert module.run is alone
    fit(module, tmp_path / "a", 2, EMA(), Checkpoint(12))
    first = module.run
    fit(module, tmp_path / "b", 2)
    assert first is not alone
    assert (module.run.averages, module.run.checkpoints, module.run.sampled_weights) == (None, None, "raw")
    assert (first.folder, module.run.folder) == (RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b"))


def test_a_copy_of_a_module_shares_nothing_with_the_run_of_the_original(tmp_path):
    module = digits_module()
    fit(module, tmp_path, 1, EMA())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same(weights(other), weights(module))
        assert other.run is not module.run
        assert other.run.trainer is None


def test_metrics_reach_every_logger_with_the_images_seen(tmp_path):
    loggers, module = [Memory(), Memory()], digits_module()
    fit(module, tmp_path, 2, logger=loggers)
    module.run.log({"mine": 0.5})
    assert [logger.rows for logger in loggers] == [[{"step": 2, "mine": 0.5, "images_seen": 24}]] * 2


def test_plain_data_loaders_train_but_cannot_be_scored(tmp_path):
    module = digits_module()
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_steps": 1, "enable_progress_bar": False}
    dataset: Any = [{"data": torch.randn(1, 8, 8), "labels": i} for i in range(10)]
    trainer = pl.Trainer(**settings, default_root_dir=tmp_path, callbacks=[Checkpoint(12)])
    trainer.fit(module, DataLoader(dataset, 6))
    assert module.run.data is None
    assert module.run.folder.last.exists()
    curve = QualityCurve(12, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"quality\.every: scores need one of fmlit's data modules"):
        pl.Trainer(**settings, default_root_dir=tmp_path, callbacks=[curve]).fit(
            digits_module(), DataLoader(dataset, 6)
        )
