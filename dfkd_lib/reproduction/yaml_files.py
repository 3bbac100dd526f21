"""Read YAML as people mean it: plain values only, each key once, and no aliases that grow into millions of values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError

MOST_LETTERS = 1_000_000
MOST_VALUES = 100_000  # when each alias is written out
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty one.

    Raises:
        InputError: the file is not there, not YAML, not a mapping from names, sets a key twice, or is far too large.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if len(text) > MOST_LETTERS:
            raise ValueError(f"it has more than {MOST_LETTERS:,} letters")
        loader = _LOADER(text)
        root = loader.get_single_node()
        if root is None:
            return {}
        _check(root, {})
        read = loader.construct_document(root)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise InputError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    except RecursionError as e:
        raise InputError(f"{path} is nested too deeply") from e
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise InputError(f"{path} must hold lines such as `seed: 3`")
    return read


def _check(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out.

    Raises:
        ValueError: there are too many, a node contains itself, or a mapping has a key twice.
    """
    if (known := sizes.get(id(node))) is not None:
        if not known:
            raise ValueError(f"what begins in line {node.start_mark.line + 1} contains itself")
        return known
    sizes[id(node)] = 0  # being counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"key {twice[0]!r} is there twice, in what begins in line {node.start_mark.line + 1}")
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = size = 1 + sum(_check(child, sizes) for child in children)
    if size > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    return size
