"""What several commands do with their options."""

from __future__ import annotations

from ..data import Dataset, load_dataset
from ..training import TrainConfig


def load_data(config: TrainConfig, source: str | None = None) -> Dataset:
    """The dataset of a configuration, or another `source` prepared in the same way.

    The split into training and held-out classes does not depend on the run's seed, so that `evaluate` finds
    the classes that training held out.
    """
    return load_dataset(
        source or config.data, image_size=config.image_size, ways=config.ways, shots=config.shots
    )
