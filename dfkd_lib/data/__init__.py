"""Named datasets as tensors on a device, images here and sentences in `text`; folders of one's own; the guard of
data-free methods; augmentation. Imports what lies below it alone: runtime, files, locations, errors.
"""

from .augment import crop_flip, minibatches, paired_crop_flip, resized_crop_flip
from .catalogue import DatasetInfo, info, names
from .folders import read_image
from .guard import no_training_data, opened
from .imageset import ImageSet, pick
from .loading import load
from .sources import prepare

__all__ = [
    "DatasetInfo",
    "ImageSet",
    "crop_flip",
    "info",
    "load",
    "minibatches",
    "names",
    "no_training_data",
    "opened",
    "paired_crop_flip",
    "pick",
    "prepare",
    "read_image",
    "resized_crop_flip",
]
