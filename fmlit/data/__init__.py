"""Data sets, each a LightningDataModule that deals one global stream of batches to all ranks."""
