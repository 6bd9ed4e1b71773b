"""Images sorted by class, and episodes drawn from them."""

from .datasets import Dataset, load_dataset, split_classes
from .episodes import Episode, Episodes, encode_inputs, num_outputs
from .fetch import FetchError, cache_folder, fetch_omniglot
from .folder import image_files, load_folder
from .glyphs import generate_glyphs
from .images import ClassImages, load_images, read_grey, read_image
from .npz import load_npz
from .omniglot import load_omniglot
from .tables import load_csv, load_pairs

__all__ = [
    "ClassImages",
    "Dataset",
    "Episode",
    "Episodes",
    "FetchError",
    "cache_folder",
    "encode_inputs",
    "fetch_omniglot",
    "generate_glyphs",
    "image_files",
    "load_csv",
    "load_dataset",
    "load_folder",
    "load_images",
    "load_npz",
    "load_omniglot",
    "load_pairs",
    "num_outputs",
    "read_grey",
    "read_image",
    "split_classes",
]
