"""Named text datasets as sentences, the tokenisers that cut texts into words, and where texts come from.

On disk a text dataset is `<data root>/<name>/<split>.csv.xz` with the columns text and label. A file that is there is
used as it is; what is missing is fetched from Hugging Face through the package `datasets`. The embedded set
`digit_sentences` needs neither files nor packages: an 8x8 digit is a sentence of eight words, one per row of pixels.
"""

from __future__ import annotations

import csv
import hashlib
import lzma
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DamagedFile, DataUnavailable, InputError, unknown
from ..files import lock, replace_file
from ..locations import cache_root, data_root
from . import guard, sources
from .encoders import located
from .sentences import SentenceSet, Vocabulary

SPLITS = ("fit", "held_out", "test")
DIGIT_WORDS = 64
ORDERED_WORDS = 30


@dataclass(frozen=True)
class TextInfo:
    """Facts about a named text dataset.

    Attributes:
        classes: their names, in the order of the labels.
        truncation: what a text that is too long keeps: "head", or "head and tail", half and half.
        source: one line, what the texts are.
        hub: the dataset on Hugging Face, "" where nothing is downloaded.
        columns: there, the columns that make up the text.
    """

    name: str
    classes: tuple[str, ...]
    truncation: str
    source: str
    hub: str = ""
    columns: tuple[str, ...] = ("text",)


_DBPEDIA = (
    "company", "school", "artist", "athlete", "office holder", "transport", "building", "nature", "village", "animal",
    "plant", "album", "film", "written work",
)  # fmt: skip
_ALL = (
    TextInfo("digit_sentences", sources.DIGIT_NAMES, "head", "scikit-learn's digits, one word per row of pixels"),
    TextInfo("agnews", ("World", "Sports", "Business", "Sci/Tech"), "head", "news, title and description",
             "fancyzhx/ag_news"),
    TextInfo("imdb", ("negative", "positive"), "head and tail", "film reviews", "stanfordnlp/imdb"),
    TextInfo("dbpedia", _DBPEDIA, "head", "first sentences of encyclopaedia entries", "fancyzhx/dbpedia_14",
             ("title", "content")),
    TextInfo("agnews_order", ("shuffled", "in order"), "head", "AG News, the words of every second text shuffled"),
)  # fmt: skip
_BY_NAME = {d.name: d for d in _ALL}


def names() -> list[str]:
    """Names of the text datasets."""
    return [d.name for d in _ALL]


def info(name: str) -> TextInfo:
    """Facts about one text dataset.

    Raises:
        InputError: there is no such dataset.
    """
    if name not in _BY_NAME:
        raise unknown("text dataset", name, _BY_NAME)
    return _BY_NAME[name]


def load(
    name: str,
    split: str,
    *,
    length: int,
    tokenizer: Any = None,
    limit: int = 0,
    device: str | torch.device = "cpu",
) -> SentenceSet:
    """Load one split of a text dataset as token ids.

    Args:
        name: one of `names()`.
        split: "fit" (for the teacher), "held_out" (for choosing settings) or "test".
        length: L; longer texts are cut as `info(name).truncation` says. Digit sentences always have 10 tokens.
        tokenizer: as :func:`tokenizer_for` or :func:`tokenizer_of` gives it; digit sentences need none.
        limit: take the first so many; 0 takes all.

    Raises:
        InputError: unknown name or split, or a length that holds no word.
        DataUnavailable: neither on disk nor reachable.
        DataFreeViolation: inside `no_training_data`, unless the split is "test".
    """
    about = info(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    guard.check(name, split)
    if length < 4:
        raise InputError(f"length must be at least 4 tokens, not {length}")
    if name == "digit_sentences":
        loaded = _digit_sentences(split)
    else:
        written, labels = texts(name, split)
        if limit:
            written, labels = written[:limit], labels[:limit]
        ids = encode(written, tokenizer, length, about.truncation)
        loaded = SentenceSet(
            ids, torch.from_numpy(labels), vocabulary_of(tokenizer), classes=about.classes, name=name, split=split
        )
    loaded = loaded.take(limit) if limit else loaded
    guard.note(name, split, loaded.fingerprint)
    return loaded.to(device)


def texts(name: str, split: str) -> tuple[list[str], np.ndarray]:
    """The texts of one split and their labels, int64 [N].

    Where there is a training file, every tenth row of each class is held out. AG News may be there as its test file
    alone: then a fixed shuffle cuts each class of 1,900 into 1,500 for the teacher, 100 held out and 300 for test.

    The texts of "agnews_order" are those of AG News, cut to their first 30 words, so that order alone tells the classes
    apart: in every second text of each topic the words are shuffled, the same way at each call.
    """
    guard.check(name, split)
    if name == "agnews_order":
        return _every_second_shuffled(*texts("agnews", split))
    folder = data_root() / name
    alone = name == "agnews" and (folder / "test.csv.xz").is_file() and not (folder / "train.csv.xz").is_file()
    written, labels = _read(name, "test" if alone or split == "test" else "train")
    order = np.random.RandomState(0).permutation(len(labels))  # RandomState: its stream is promised never to change
    written, labels = [written[i] for i in order], labels[order]
    rank = sources.rank_in_class(labels)
    if alone:
        share = rank / np.bincount(labels)[labels]
        chosen = {"fit": share < 15 / 19, "held_out": (share >= 15 / 19) & (share < 16 / 19), "test": share >= 16 / 19}
        at = np.flatnonzero(chosen[split])
    elif split == "test":
        at = np.arange(len(labels))
    else:
        at = np.flatnonzero((rank % 10 == 9) == (split == "held_out"))
    return [written[i] for i in at], labels[at]


def _every_second_shuffled(written: list[str], topics: np.ndarray) -> tuple[list[str], np.ndarray]:
    in_order = sources.rank_in_class(topics) % 2
    shuffle = np.random.RandomState(0).permutation
    made = []
    for text, kept in zip(written, in_order, strict=True):
        words = text.split()[:ORDERED_WORDS]
        made.append(" ".join(words if kept else [words[i] for i in shuffle(len(words))]))
    return made, in_order.astype(np.int64)


def _read(name: str, stored: str) -> tuple[list[str], np.ndarray]:
    path = data_root() / name / f"{stored}.csv.xz"
    if not path.is_file():
        _fetch(name, stored, path)
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        written, labels = [row["text"] for row in rows], np.array([int(row["label"]) for row in rows], np.int64)
    except (KeyError, TypeError, ValueError, OSError, EOFError, lzma.LZMAError, csv.Error) as e:
        raise DamagedFile(f"{path} is not a table of text and label; delete it to have it made anew") from e
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(info(name).classes):
        raise DamagedFile(f"{path} has labels outside 0..{len(info(name).classes) - 1}; delete it")
    return written, labels


def _fetch(name: str, stored: str, path: Path) -> None:
    """Copy one split from Hugging Face to `path`."""
    remedy = f"put a table of text and label at {path}"
    try:
        import datasets
    except ImportError:
        raise DataUnavailable(f"{name} is not on disk; {remedy}, or python -m pip install datasets") from None
    about = info(name)
    print(f"downloading {name} ({stored}) once, to {path}", flush=True)
    try:
        rows = datasets.load_dataset(about.hub, split=stored)
    except Exception as e:  # the package raises many kinds of errors where there is no network
        raise DataUnavailable(f"{name}: {about.hub} cannot be reached ({type(e).__name__}); {remedy}") from e
    written = [" ".join(parts) for parts in zip(*(rows[column] for column in about.columns), strict=True)]
    with (
        lock(path.with_suffix(".lock")),
        replace_file(path) as temporary,
        lzma.open(temporary, "wt", encoding="utf-8", newline="") as f,
    ):
        csv.writer(f).writerows([("text", "label"), *zip(written, rows["label"], strict=True)])


def transformers_or_error() -> Any:
    """The package transformers, silent.

    Raises:
        InputError: it is not installed.
    """
    try:
        with warnings.catch_warnings():  # tqdm warns where it finds no widgets
            warnings.simplefilter("ignore")
            import transformers
    except ImportError:
        raise InputError("the text chapter needs transformers; python -m pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def tokenizer_for(name: str, vocabulary_size: int = 8000) -> Any:
    """A lower-case WordPiece tokeniser, made once from the texts that the teacher is trained on, and cached.

    The vocabulary belongs to the teacher, as its weights do: a method that is given the teacher is given it too.
    """
    transformers = transformers_or_error()
    from tokenizers import BertWordPieceTokenizer

    written, _ = texts(name, "fit")
    digest = hashlib.sha256(repr((vocabulary_size, written)).encode()).hexdigest()[:12]
    path = cache_root() / "teachers" / f"{name}-wordpiece-{vocabulary_size}-{digest}.txt"
    with lock(path.with_suffix(".lock")):
        if not path.is_file():
            made = BertWordPieceTokenizer(lowercase=True)
            made.train_from_iterator(written, vocab_size=vocabulary_size, show_progress=False)
            words = made.get_vocab()
            with replace_file(path) as temporary:
                temporary.write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n", encoding="utf-8")
    words = {word: i for i, word in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1])}
    return transformers.BertTokenizer(vocab=words, do_lower_case=True)


def tokenizer_of(encoder: str) -> Any:
    """The tokeniser of an encoder: "minilm", a local Hugging Face folder, or a name there as "bert-base-uncased".

    Raises:
        DataUnavailable: it cannot be read there.
    """
    transformers = transformers_or_error()
    place = located(encoder)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, local_files_only=Path(place).is_dir())
    except (OSError, ValueError) as e:
        raise DataUnavailable(f"no tokeniser at {encoder!r}; text_encoder must be a local encoder folder") from e


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """What a tokeniser of the BERT family knows.

    Raises:
        InputError: it lacks one of the four special tokens.
    """
    pad, cls, sep, mask = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "cls", "sep", "mask"))
    if pad is None or cls is None or sep is None or mask is None:
        raise InputError("the tokeniser must have tokens for padding, [CLS], [SEP] and [MASK], as BERT's has")
    words = tuple(str(word) for word in tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    return Vocabulary(words, pad, cls, sep, mask, special=tuple(tokenizer.all_special_ids))


def encode(written: Sequence[str], tokenizer: Any, length: int, truncation: str = "head") -> Tensor:
    """Texts as token ids int64 [N, length], framed by [CLS] and [SEP] and padded at the end."""
    room = length - 2
    head = room if truncation == "head" else room - room // 2
    rows = torch.full((len(written), length), tokenizer.pad_token_id)
    for row, ids in zip(rows, tokenizer(list(written), add_special_tokens=False)["input_ids"], strict=True):
        cut = ids if len(ids) <= room else ids[:head] + ids[len(ids) - (room - head) :]
        row[: len(cut) + 2] = torch.tensor([tokenizer.cls_token_id, *cut, tokenizer.sep_token_id])
    return rows


@cache
def digit_words() -> np.ndarray:
    """The 64 words of a digit sentence as rows of 8 pixels, [64, 8] in [0, 255]: K-means of the training rows."""
    from sklearn.cluster import KMeans

    rows = sources.digits("train").images.reshape(-1, 8).astype(np.float64)
    return np.asarray(KMeans(DIGIT_WORDS, random_state=0, n_init=1).fit(rows).cluster_centers_).clip(0, 255)


def digit_vocabulary() -> Vocabulary:
    """[PAD], [CLS], [SEP], [MASK] and the 64 words of :func:`digit_words`, in this order."""
    return Vocabulary(("[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"row{i}" for i in range(DIGIT_WORDS))), 0, 1, 2, 3)


def digit_images(ids: Tensor) -> Tensor:
    """Digit sentences, token ids [N, 10], as images [N, 1, 8, 8] in [0, 1]; what is no word is grey."""
    rows = torch.full((4 + DIGIT_WORDS, 8), 0.5)
    rows[4:] = torch.from_numpy(digit_words()).float() / 255
    return rows[ids[:, 1:9].cpu()][:, None]


def _digit_sentences(split: str) -> SentenceSet:
    stored = sources.digits("test" if split == "test" else "train")
    images, labels = stored.images, stored.labels
    if split != "test":
        chosen = (sources.rank_in_class(labels) % 10 == 9) == (split == "held_out")
        images, labels = images[chosen], labels[chosen]
    rows = images.reshape(-1, 1, 8).astype(np.float64)
    nearest = ((rows - digit_words()) ** 2).sum(-1).argmin(1).reshape(len(images), 8)
    vocabulary = digit_vocabulary()
    ids = torch.full((len(images), 10), vocabulary.sep)
    ids[:, 0] = vocabulary.cls
    ids[:, 1:9] = torch.from_numpy(nearest) + 4
    return SentenceSet(
        ids, torch.from_numpy(labels), vocabulary, classes=sources.DIGIT_NAMES, name="digit_sentences", split=split
    )
