"""The options that ``evaluate``, ``score`` and ``reference`` share: the real images, and how others are compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from fmlit.cli.options import Names, choose_device, processes
from fmlit.core.errors import UserError
from fmlit.data.data_module import DataModule
from fmlit.evaluation.scoring import Scorer, choose_features
from fmlit.metrics import Features, ReferenceFile
from fmlit.storage.loading import find_model, training_data


@dataclass(frozen=True)
class ScoringOptions:
    """The real images, and how they are compared with others.

    Args:
        data: The real images; by default the training data of the checkpoint.
        features: In which distances are taken: inception (of FID), pixels, or a class of features. By default pixels
            for images with a side below 32 pixels, and inception for all others.
        splits: Parts of the data to compare with: train, or train,test, where a gap shows memorization.
        flip: Compare with the real images and their mirror images.
        batch_size: Images per batch and process.
        cache: Folder of the statistics of real images.
        trust: Packages besides fmlit whose classes a checkpoint may name.
        device: auto, cpu, cuda, cuda:1, ...
    """

    data: DataModule | None = None
    features: Literal["inception", "pixels"] | Features | None = None
    splits: Names = Names(["train"])
    flip: bool = False
    batch_size: int = 250
    cache: str = "data/statistics"
    trust: Names = Names()
    device: str = "auto"

    @contextmanager
    def scorer(self, metrics: Sequence[str], checkpoint: str | None, reference: str | None = None) -> Iterator[Scorer]:
        """What scores images by these options, with all processes of torchrun joined for the length of the block.

        Args:
            metrics: that the scorer computes.
            checkpoint: names the data if the options do not.
            reference: a file to compare with in place of the splits. Then nothing needs to name the data.

        Raises:
            UserError: the data are not named, cannot be built, or are not images; or the file is not a reference.
        """
        if reference is not None and (self.flip or self.splits != ScoringOptions.splits):
            raise UserError("--splits and --flip have no effect with --reference: leave them out")
        device = choose_device(self.device)
        with processes(device) as ranks:
            with ranks.fail_together():
                against = ReferenceFile(reference) if reference is not None else None
            file = None if checkpoint is None else find_model(checkpoint, "checkpoint")
            data = self.data
            if data is None and (against is None or file is not None):
                data = training_data(file, self.trust)
            if data is not None:
                if len(data.shape) != 3:
                    raise UserError(
                        f"only images can be evaluated, and {type(data).__name__} holds vectors of shape {data.shape}"
                    )
                ranks.from_first(data.prepare_data)
                data.setup("validate")
            features = choose_features(self.features, data.shape if data else (), against)
            where = self.splits, self.flip, self.cache, self.batch_size, device, against
            yield Scorer(data, metrics, features, *where)
