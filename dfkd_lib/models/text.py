"""Text classifiers of the BERT family: built small, read from a folder, cut into students, trained and cached.

The networks are those of the package transformers, which is imported inside the functions.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.encoders import located
from ..data.sentences import SentenceSet, Vocabulary
from ..data.text import transformers_or_error
from ..errors import DamagedFile, DataUnavailable, InputError, unknown
from ..files import lock, read_json, sha256, write_json
from ..locations import cache_root
from ..runtime import Runtime
from ..training import checkpoints
from ..training.finetuning import FineTuning, Recipe, key_mask
from ..training.fit import fit, resumed
from ..training.modes import evaluating
from ..training.players import freeze

KEEP = ("first", "spaced", "random")


def bert(
    vocabulary: Vocabulary, n_classes: int, *, layers: int, width: int, heads: int, positions: int, dropout: float = 0.1
) -> Any:
    """A `BertForSequenceClassification` with random weights; its feed-forward layers are four times as wide.

    Raises:
        InputError: the width cannot be shared out among the heads.
    """
    if width % heads:
        raise InputError(f"a width of {width} cannot be shared by {heads} heads; choose a multiple")
    transformers = transformers_or_error()
    config = transformers.BertConfig(
        vocab_size=len(vocabulary.words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=positions, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, num_labels=n_classes, pad_token_id=vocabulary.pad,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def encoder(folder: str, n_classes: int) -> Any:
    """A pretrained encoder with a new classifier: "minilm", a local folder, or a name such as "bert-base-uncased".

    Raises:
        DataUnavailable: it cannot be read there.
        InputError: it is not of the BERT family: an embedding module and a list of encoder layers are needed.
    """
    transformers = transformers_or_error()
    place = located(folder)
    try:
        made = transformers.AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=n_classes, local_files_only=Path(place).is_dir()
        )
    except (OSError, ValueError) as e:
        raise DataUnavailable(f"no encoder at {folder!r}; text_encoder must be a local encoder folder") from e
    if not hasattr(made.base_model, "embeddings"):
        raise InputError(f"{folder!r} holds a {type(made).__name__}, which is not of the BERT family")
    stack_of(made)
    return made


def stack_of(network: Any) -> Any:
    """The module that holds the encoder layers in its list `layer`.

    Raises:
        InputError: the network has none.
    """
    for name in ("encoder", "transformer"):  # the second is DistilBERT's
        stack: Any = getattr(network.base_model, name, None)
        if isinstance(getattr(stack, "layer", None), nn.ModuleList):
            return stack
    raise InputError(f"a {type(network).__name__} has no list of encoder layers, as the BERT family has")


def layers_of(network: Any) -> nn.ModuleList:
    """The encoder layers.

    Raises:
        InputError: see :func:`stack_of`.
    """
    layers: nn.ModuleList = stack_of(network).layer
    return layers


def most_positions(network: Any) -> int:
    """The most tokens that a sentence may have. RoBERTa keeps its first positions for padding."""
    table = getattr(getattr(network.base_model, "embeddings", None), "position_embeddings", None)
    kept = getattr(table, "padding_idx", None)
    return int(network.config.max_position_embeddings) - (0 if kept is None else kept + 1)


def word_table(network: Any) -> Tensor:
    """W [V, H], the word embeddings, without gradient."""
    table: Tensor = network.get_input_embeddings().weight
    return table.detach()


def nearest_tokens(e: Tensor, table: Tensor, ordinary: Tensor) -> tuple[Tensor, Tensor]:
    """The ordinary token whose row of the table has the largest cosine with each embedding.

    Args:
        e: [..., H].
        table: W [V, H].
        ordinary: ids, int64.

    Returns:
        Token ids and cosines, both [...].
    """
    similar = F.normalize(e, dim=-1) @ F.normalize(table[ordinary], dim=-1).T
    cosines, at = similar.max(-1)
    return ordinary[at], cosines


def table_statistics(
    network: Any, table: Tensor, ordinary: Tensor, length: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [H] of what the embedding module makes of 4096 random (token, position) pairs."""
    n = -(-4096 // length)
    draw = torch.Generator().manual_seed(seed)
    ids = ordinary[torch.randint(len(ordinary), (n, length), generator=draw).to(ordinary.device)]
    with torch.no_grad():
        u = network.base_model.embeddings(input_ids=None, inputs_embeds=table[ids]).flatten(0, 1)[:4096]
    return u.mean(0), u.std(0)


def chosen_layers(n: int, k: int, keep: str = "first") -> list[int]:
    """Which of the teacher's n layers become the student's k.

    Args:
        keep: "first" (0..k-1, as Patient-KD's), "spaced" (round((i+1) n/k) - 1); for "random", whose layers are drawn
            anew, the first k are where they come from in shape.

    Raises:
        InputError: k is not in 1..n, or an unknown rule.
    """
    if not 1 <= k <= n:
        raise InputError(f"a student has 1..{n} layers of this teacher, not {k}")
    if keep not in KEEP:
        raise unknown("rule for the student's layers", keep, KEEP)
    return [round((i + 1) * n / k) - 1 for i in range(k)] if keep == "spaced" else list(range(k))


def cut(teacher: Any, k: int, keep: str = "first", *, dropout: float = 0.1, seed: int = 0) -> Any:
    """A student of k layers: the teacher's embedding module, k of its layers, its pooler and its classifier.

    The embedding module is frozen: training enters behind the word table, so the table would get no gradient.

    Args:
        keep: see :func:`chosen_layers`; "random" draws the layers' weights anew, N(0, 0.02).
        dropout: of all its dropout layers in training.
        seed: of the new weights.

    Raises:
        InputError: see :func:`chosen_layers`.
    """
    kept = chosen_layers(len(layers_of(teacher)), k, keep)
    student = copy.deepcopy(teacher)
    stack_of(student).layer = nn.ModuleList([copy.deepcopy(layers_of(teacher)[i]) for i in kept])
    student.requires_grad_(True)
    student.config.num_hidden_layers = k
    student.config.kept_layers = kept
    if keep == "random":
        drawn = torch.Generator().manual_seed(seed)
        for module in layers_of(student).modules():
            if isinstance(module, nn.Linear):
                weight = torch.randn(module.weight.shape, generator=drawn) * 0.02
                module.weight.data.copy_(weight.to(module.weight))
                module.bias.data.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = dropout
    student.base_model.embeddings.requires_grad_(False)
    return student


def predictions(network: Any, sentences: SentenceSet, runtime: Runtime, batch_size: int = 200) -> Tensor:
    """The most likely class of each sentence, int64 [N]."""
    found = []
    with evaluating(network), runtime.autocast():
        for ids, mask, _ in sentences.batches(batch_size):
            attended = key_mask(mask if sentences.padded else None, runtime.dtype)
            found.append(network(input_ids=ids, attention_mask=attended).logits.argmax(1))
    return torch.cat(found)


def labels_of(sentences: SentenceSet) -> Tensor:
    """All labels, int64 [N]."""
    return torch.cat([y for _, _, y in sentences.batches(1000)])


@dataclass(frozen=True)
class TextTeacher:
    """A trained, frozen text classifier and what is known about it, as :class:`dfkd_lib.teachers.Teacher`."""

    module: Any
    path: Path
    facts: dict[str, Any]


def train_or_load(
    train: SentenceSet, test: SentenceSet, recipe: Recipe, runtime: Runtime, *, text_encoder: str = ""
) -> TextTeacher:
    """The teacher of this recipe: from the cache, or trained now on `train` and evaluated on `test`.

    Two files in `<cache>/teachers`, as for images: the weights, and the facts with their checksum. Training that was
    cut short goes on; another process that asks meanwhile waits.

    Args:
        text_encoder: "minilm", a local Hugging Face folder, or a name there, to start from; empty: random weights.

    Raises:
        DataUnavailable: no encoder at `text_encoder`.
        DamagedFile: the cached files are corrupt.
    """
    wanted: dict[str, Any] = {
        "model": text_encoder or f"bert-{recipe.layers}x{recipe.width}",
        "data": {"name": train.name, "shape": [train.length], "fingerprint": train.fingerprint},
        "recipe": asdict(recipe),
        "seed": runtime.seed,
        "precision": runtime.precision,
        "pretrained": bool(text_encoder),
    }
    if text_encoder and (config := Path(located(text_encoder)) / "config.json").is_file():
        wanted["encoder"] = {f.name: sha256(f) for f in sorted(config.parent.glob("*.safetensors"))}
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_root() / "teachers" / f"{train.name}-text-{digest}.safetensors"
    with lock(path.with_suffix(".lock")):
        if not path.with_suffix(".json").exists():
            torch.manual_seed(runtime.seed)
            module = _build(train, recipe, text_encoder)
            method = FineTuning(module, train, recipe, runtime)
            truth = labels_of(test)
            partial = path.with_suffix(".partial.safetensors")
            result = fit(
                method, method.n_steps, name=f"teacher {wanted['model']} on {train.name}", checkpoint=partial,
                identity=wanted,
                evaluate=lambda: {"accuracy": float((predictions(module, test, runtime) == truth).float().mean())},
            )  # fmt: skip
            checkpoints.save(path, module.state_dict())
            facts = wanted | {
                "n_classes": train.n_classes,
                "test": {"accuracy": result.final("accuracy")},
                "curve": {"accuracy": result.evaluations("accuracy")},
                "seconds": result.seconds,
                "resumed": resumed(result),
                "runtime": runtime.describe(),
                "sha256": sha256(path),
            }
            write_json(path.with_suffix(".json"), facts)
            partial.unlink(missing_ok=True)
        facts = read_json(path.with_suffix(".json"), {"sha256": str, "test": {str: float}})
        if not path.exists() or sha256(path) != facts["sha256"]:
            raise DamagedFile(
                f"teacher {path} is missing, damaged or cut short; delete {path.with_suffix('.json')} to train it anew"
            )
        module = _build(train, recipe, text_encoder)
        module.load_state_dict(checkpoints.load(path))
        return TextTeacher(freeze(runtime.prepare(module)), path, facts)


def _build(sentences: SentenceSet, recipe: Recipe, text_encoder: str) -> Any:
    if text_encoder:
        return encoder(text_encoder, sentences.n_classes)
    return bert(
        sentences.vocabulary, sentences.n_classes, layers=recipe.layers, width=recipe.width, heads=recipe.heads,
        positions=max(32, sentences.length), dropout=recipe.dropout,
    )  # fmt: skip


def tfidf_accuracy(train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> float:
    """Accuracy of logistic regression on TF-IDF of (texts, labels): a reference that knows no word order."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    features = TfidfVectorizer(sublinear_tf=True, max_features=50000)
    model = LogisticRegression(max_iter=300, C=10.0).fit(features.fit_transform(train[0]), train[1])
    return float(model.score(features.transform(test[0]), test[1]))
