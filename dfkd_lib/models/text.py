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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import minibatches
from ..data.text import SentenceSet, Vocabulary, transformers_or_error
from ..errors import DamagedFile, DataUnavailable, InputError, unknown
from ..files import lock, read_json, sha256, write_json
from ..locations import cache_root
from ..losses import cross_entropy
from ..runtime import Runtime
from ..training import checkpoints
from ..training.fit import fit
from ..training.modes import evaluating
from ..training.players import check_positive, freeze, restore_state, state_of
from ..training.schedules import one_cycle

KEEP = ("first", "spaced", "random")


def bert(
    vocabulary: Vocabulary, n_classes: int, *, layers: int, width: int, heads: int, positions: int, dropout: float = 0.1
) -> Any:
    """A `BertForSequenceClassification` with random weights; its feed-forward layers are four times as wide."""
    transformers = transformers_or_error()
    config = transformers.BertConfig(
        vocab_size=len(vocabulary.words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=positions, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, num_labels=n_classes, pad_token_id=vocabulary.pad,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def encoder(folder: str, n_classes: int) -> Any:
    """A pretrained encoder with a new classifier: a local folder, or a name such as "bert-base-uncased".

    Raises:
        DataUnavailable: it cannot be read there.
        InputError: it is not of the BERT family: an embedding module and a list of encoder layers are needed.
    """
    transformers = transformers_or_error()
    try:
        made = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=n_classes, local_files_only=Path(folder).is_dir()
        )
    except (OSError, ValueError) as e:
        raise DataUnavailable(f"no encoder at {folder!r}; text_encoder must be a local encoder folder") from e
    if not hasattr(made.base_model, "embeddings") or not hasattr(getattr(made.base_model, "encoder", None), "layer"):
        raise InputError(f"{folder!r} holds a {type(made).__name__}, which is not of the BERT family")
    return made


def layers_of(network: Any) -> nn.ModuleList:
    """The encoder layers."""
    layers: nn.ModuleList = network.base_model.encoder.layer
    return layers


def word_table(network: Any) -> Tensor:
    """W [V, H], the word embeddings, without gradient."""
    table: Tensor = network.get_input_embeddings().weight
    return table.detach()


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
    student.base_model.encoder.layer = nn.ModuleList([copy.deepcopy(layers_of(teacher)[i]) for i in kept])
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
            found.append(network(input_ids=ids, attention_mask=mask).logits.argmax(1))
    return torch.cat(found)


def labels_of(sentences: SentenceSet) -> Tensor:
    """All labels, int64 [N]."""
    return torch.cat([y for _, _, y in sentences.batches(1000)])


def decayed(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups of what can be trained: weight decay on matrices, none on biases and norms."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Recipe:
    """How a text classifier is trained on labels.

    Attributes:
        layers, width, heads: of a network built here; a pretrained encoder has its own.
        epochs: passes over the data.
        batch_size: sentences per step.
        lr, weight_decay: AdamW, 10 % linear warm-up, then linearly to 0, gradient norm at most 1.
        lr_head: of the classifier alone; 0 is `lr`.
        hidden: share of the tokens that are replaced by [MASK].
        dropout: of a network built here.
    """

    layers: int
    width: int
    heads: int
    epochs: int
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.01
    lr_head: float = 0.0
    hidden: float = 0.15
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "layers", "width", "heads", "epochs", "batch_size", "lr")


class FineTuning:
    """Training on labelled sentences, one update per :meth:`step`: the teacher, or a student as a reference.

    Attributes:
        n_steps: updates in the whole recipe.
    """

    data_free: ClassVar[bool] = False
    PARTS = ("student", "optimizer", "scaler", "randomness", "steps")

    def __init__(
        self, student: Any, sentences: SentenceSet, recipe: Recipe, runtime: Runtime, n_steps: int = 0
    ) -> None:
        self.recipe, self.runtime, self.sentences = recipe, runtime, sentences.to(runtime.device)
        self.student = runtime.prepare(student).train()
        head = [p for name, p in student.named_parameters() if name.startswith("classifier")]
        groups = decayed([student], recipe.weight_decay)
        if recipe.lr_head:
            groups = [{**g, "params": [p for p in g["params"] if all(p is not h for h in head)]} for g in groups]
            groups.append({"params": head, "weight_decay": 0.0, "scale": recipe.lr_head / recipe.lr})
        self.optimizer = torch.optim.AdamW(groups, recipe.lr)
        self.scaler = runtime.scaler()
        self.batches = minibatches(len(sentences), recipe.batch_size, seed=runtime.seed)
        self.n_steps = n_steps or recipe.epochs * max(1, len(sentences) // recipe.batch_size)
        self.randomness = runtime.stream("fine-tuning")
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update on the next batch; returns {"loss": ...}, detached."""
        lr = self.recipe.lr * one_cycle(self.steps, self.n_steps, warmup=0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        seed_dropout(self.runtime.seed, self.steps)
        ids, mask, y = self.sentences.batch(self.batches(self.steps).to(self.runtime.device))
        ids = self.hide(ids, mask)
        with self.runtime.autocast():
            logits = self.student(input_ids=ids, attention_mask=mask).logits.to(self.runtime.dtype)
        loss = cross_entropy(logits, y)
        clipped_update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return {"loss": loss.detach()}

    def hide(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Replace a share of the tokens, the first one excepted, by [MASK]."""
        draw = torch.rand(ids.shape, generator=self.randomness, device=ids.device)
        hidden = (draw < self.recipe.hidden) & mask.bool()
        hidden[:, 0] = False
        return torch.where(hidden, self.sentences.vocabulary.mask, ids)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dfkd_lib.training.fit.Method`."""
        return state_of(self, self.PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        restore_state(self, self.PARTS, state)


def seed_dropout(seed: int, step: int) -> None:
    """Dropout can only draw from torch's global stream: fix it per step, so that no earlier run matters."""
    torch.manual_seed(1_000_003 * seed + step)


def clipped_update(optimizer: torch.optim.Optimizer, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
    """One descent step on `loss` with the gradient's norm cut to 1."""
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    scaler.step(optimizer)
    scaler.update()


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
        text_encoder: a local Hugging Face folder, or a name there, to start from; empty: random weights.

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
    if text_encoder and (config := Path(text_encoder) / "config.json").is_file():
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
                evaluate=lambda: {"accuracy": float((predictions(module, test, runtime) == truth).float().mean())},
            )  # fmt: skip
            checkpoints.save(path, module.state_dict())
            facts = wanted | {
                "n_classes": train.n_classes,
                "test": {"accuracy": result.final("accuracy")},
                "curve": {"accuracy": result.evaluations("accuracy")},
                "seconds": result.seconds,
                "runtime": runtime.describe(),
                "sha256": sha256(path),
            }
            write_json(path.with_suffix(".json"), facts)
            partial.unlink(missing_ok=True)
        facts = read_json(path.with_suffix(".json"))
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


def tfidf_accuracy(
    train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any], ngrams: int = 1, limit: int = 0
) -> float:
    """Accuracy of logistic regression on TF-IDF of (texts, labels): a reference that knows no word order.

    Args:
        ngrams: longest run of words that counts as a feature.
        limit: leading words of each text that are read; 0 reads all.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    read = [[" ".join(t.split()[:limit]) if limit else t for t in texts] for texts in (train[0], test[0])]
    features = TfidfVectorizer(ngram_range=(1, ngrams), sublinear_tf=True, max_features=50000)
    model = LogisticRegression(max_iter=300, C=10.0).fit(features.fit_transform(read[0]), train[1])
    return float(model.score(features.transform(read[1]), test[1]))
