"""What each dataset is, without opening it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import unknown


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a named dataset.

    Attributes:
        task: "classification" or "segmentation".
        image_shape: (channels, height, width) as stored, before any resizing.
        n_classes: number of classes, the void class not counted.
        mean, std: per channel, of images in [0, 1]; what a teacher's first layer normalises with.
        source: one line, what the images are.
        void: mask value of pixels that belong to no class, or None.
        url: a file of the download, asked for before anything else to see whether the network is there;
            "" where nothing is downloaded.
    """

    name: str
    task: str
    image_shape: tuple[int, int, int]
    n_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    void: int | None = None
    url: str = ""


_HALF = (0.5, 0.5, 0.5)
_ALL = (
    DatasetInfo(
        "digits", "classification", (1, 8, 8), 10, (0.3052,), (0.3760,),
        "1,797 handwritten digits that come with scikit-learn; our fixed stratified 80/20 split",
    ),
    DatasetInfo(
        "digit_scenes", "segmentation", (1, 32, 32), 11, (0.1810,), (0.2907,),
        "1,000 and 200 grids of 3x3 cells with one digit or none each; the mask labels the digit's square",
    ),
    DatasetInfo(
        "photo_patches", "classification", (3, 32, 32), 2, (0.4326, 0.4225, 0.3697), (0.3506, 0.2731, 0.2945),
        "1,000 and 200 patches of the two photographs that come with scikit-learn: images unlike any other set",
    ),
    DatasetInfo(
        "mnist", "classification", (1, 28, 28), 10, (0.1307,), (0.3081,),
        "handwritten digits, 60,000 and 10,000",
        url="https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
    ),
    DatasetInfo(
        "fashion_mnist", "classification", (1, 28, 28), 10, (0.2860,), (0.3530,),
        "pieces of clothing in grey, 60,000 and 10,000",
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz",
    ),
    DatasetInfo(
        "kmnist", "classification", (1, 28, 28), 10, (0.1918,), (0.3483,),
        "cursive Japanese characters, 60,000 and 10,000",
        url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/t10k-labels-idx1-ubyte.gz",
    ),
    DatasetInfo(
        "svhn", "classification", (3, 32, 32), 10, _HALF, _HALF,
        "house numbers cropped to one digit, 73,257 and 26,032; the extra images are not used",
        url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
    ),
    DatasetInfo(
        "cifar10", "classification", (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
        "photographs of ten kinds of animals and vehicles, 50,000 and 10,000",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    DatasetInfo(
        "cifar100", "classification", (3, 32, 32), 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761),
        "photographs of a hundred kinds of things, 50,000 and 10,000",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    DatasetInfo(
        "camvid", "segmentation", (3, 360, 480), 11, (0.4118, 0.4255, 0.4323), (0.3069, 0.3110, 0.3068),
        "street scenes from a moving car, 11 classes and void, 367 for training, 101 held out, 233 for test",
        void=11,
    ),
)  # fmt: skip
_BY_NAME = {d.name: d for d in _ALL}


def names(task: str | None = None) -> list[str]:
    """Names of the datasets that `load` knows, of one task or of all."""
    return [d.name for d in _ALL if task in (None, d.task)]


def info(name: str) -> DatasetInfo:
    """Facts about one dataset.

    Raises:
        InputError: there is no such dataset.
    """
    if name not in _BY_NAME:
        raise unknown("dataset", name, _BY_NAME)
    return _BY_NAME[name]
