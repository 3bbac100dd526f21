"""One call for text: from a trained classifier of sentences to a smaller one, without a sentence."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checking, lending, records
from .data.sentences import SentenceSet, Vocabulary
from .data.text import encode, vocabulary_of
from .distilled import keep
from .errors import InputError, unknown
from .files import lock, output_folder
from .measures.evaluation import agreement
from .methods.as_dfd import ASDFD, Settings
from .methods.as_dfd_baselines import ModifiedZSKD, ModifiedZSKT, RandomText
from .methods.text_distiller import Distillation, Sentences, TextDistiller, look
from .models import count_parameters
from .models.text import labels_of, most_positions, predictions, word_table
from .runtime import Runtime, hardware, random_state_kept
from .settings import made, typed
from .training.budget import Budget
from .training.fit import Fit, fit, resumed
from .training.modes import in_eval_mode, still

_FRESH = 256  # crafted sentences on which the networks are compared
_METHODS: dict[str, tuple[type[TextDistiller], type[Distillation]]] = {
    "as-dfd": (ASDFD, Settings),
    "random-text": (RandomText, Distillation),
    "zskd": (ModifiedZSKD, Settings),
    "zskt": (ModifiedZSKT, Distillation),
}


@dataclass(frozen=True)
class DistilledText:
    """What came out of :func:`distill_text`.

    Attributes:
        student: a trained copy of the student that was passed in, in eval mode, on that one's device.
        agreement: share of fresh sentences, made as those for training, on which student and teacher name the same
            class. No accuracy: crafted sentences are easier than real ones.
        agreement_on_words: the same on sentences of random words, whichever the method.
        classes_named: how many different classes the teacher names on the fresh sentences.
        accuracy: of "teacher" and "student" on the test texts; empty if none were given.
        budget: what was spent; its images are sentences.
        seconds: wall-clock time, resumed parts included.
        fit: the history of the training metrics.
        record: all this as JSON knows it, with every setting, the versions of code and packages, and "warnings".
    """

    student: nn.Module
    agreement: float
    agreement_on_words: float
    classes_named: int
    accuracy: dict[str, float]
    budget: Budget
    seconds: float
    fit: Fit
    record: dict[str, Any]

    def __str__(self) -> str:
        asked, networks = self.record["parameters"], self.record["networks"]
        lines = [
            f"{asked['method']}: {self.budget.student_updates:,} student updates on {self.budget.images:,} sentences "
            f"in {self.seconds:.0f} s",
            f"{networks['teacher']:,} -> {networks['student']:,} parameters",
            f"agreement on fresh sentences {self.agreement:.1%}, where the teacher names {self.classes_named} of "
            f"{asked['num_classes']} classes; on random words {self.agreement_on_words:.1%}",
        ]
        if self.accuracy:
            lines.append(f"test accuracy {self.accuracy['student']:.1%}, teacher {self.accuracy['teacher']:.1%}")
        return "\n".join([*lines, *(f"warning: {line}" for line in self.record["warnings"])])


def distill_text(
    teacher: nn.Module,
    student: nn.Module,
    tokenizer: Any,
    method: str = "as-dfd",
    *,
    length: int = 64,
    n_updates: int = 1000,
    test: tuple[Sequence[str], Sequence[int]] | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> DistilledText:
    """Train a student to classify sentences as a teacher does, on embeddings that are made from the teacher alone.

    Neither network is changed: the student that is trained is a copy, and so is the teacher that is asked.

    Args:
        teacher: a sequence classifier of transformers in eval mode, whose forward takes `inputs_embeds`: of the
            BERT, DistilBERT, RoBERTa, ELECTRA, ... kind.
        student: another, with a word table of the same shape; its copy gets the teacher's table, which stays as it is.
            :func:`dfkd_lib.models.text.cut` makes one of a teacher's layers.
        tokenizer: the teacher's; its special tokens and words are read.
        method: "as-dfd", "random-text" (needs no crafting, and is hard to beat), "zskd" or "zskt".
        length: most tokens of a sentence, [CLS] and [SEP] included.
        n_updates: student updates.
        test: (texts, labels) to evaluate both networks on when all is done.
        device, precision: see :meth:`dfkd_lib.runtime.Runtime.choose`.
        seed: of all random draws; the global random state is left as it was.
        out: folder for `student.safetensors` (its weights), `record.json` and a checkpoint. The same call with the same
            folder continues an interrupted run.
        progress: show a live line, on a terminal or in a notebook.
        settings: any setting of :class:`dfkd_lib.methods.as_dfd.Settings`, such as batch_size=16 or start="tokens";
            for "random-text" and "zskt" of :class:`dfkd_lib.methods.text_distiller.Distillation`.

    Raises:
        InputError: something does not fit; one line says what, and what to do.
        NonFiniteLoss: the training diverged.
        DFKDError: the folder is in use, or holds the checkpoint of another run.

    Warns:
        UserWarning: a network may not be what it should, or a file could not be written; also in `record["warnings"]`.
    """
    if method not in _METHODS:
        raise unknown("method", method, _METHODS)
    kind, settings_kind = _METHODS[method]
    known = [f.name for f in fields(settings_kind)]
    for name in settings:
        if name not in known:
            raise unknown("setting", name, known)
    shortest = settings.pop("min_length", min(16, typed("length", length, int)))
    chosen = made(settings_kind, {**settings, "length": length, "min_length": shortest, "n_updates": n_updates})
    for who, network in (("teacher", teacher), ("student", student)):
        checking.check_module(network, who)
    teacher, student = lending.bare(teacher), lending.bare(student)
    checking.check_roles(teacher, student)
    n_classes = _check_classifiers(teacher, student, chosen)
    vocabulary = vocabulary_of(tokenizer)
    seed, progress = typed("seed", seed, int), typed("progress", progress, bool)
    folder = None if out is None else output_folder(out)
    told: list[str] = []
    with random_state_kept(device), torch.inference_mode(False), torch.enable_grad(), ExitStack() as held:
        runtime = Runtime.choose(str(device), precision, seed=seed)
        test_set = None if test is None else _test_set(test, tokenizer, vocabulary, length, n_classes)
        asked: dict[str, Any] = {
            "method": method,
            "num_classes": n_classes,
            "precision": runtime.precision,
            "settings": asdict(chosen),
        }
        parts = [json.dumps(asked | {"seed": seed}), lending.fingerprint(teacher), lending.fingerprint(student)]
        digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]
        trained = lending.copied(student, "student")
        if _share_table(trained, teacher):
            told.append("the student's word table was not the teacher's; the trained copy has the teacher's")
        algorithm = kind(lending.copied(teacher, "teacher"), trained, vocabulary, chosen, runtime)
        checkpoint = None
        if folder:
            held.enter_context(lock(folder / ".lock", timeout=0, what=f"folder {folder}"))
            if why := lending.not_kept(trained, folder):
                told.append(f"no checkpoint can hold the student ({why}), so a run that is stopped starts anew")
            else:
                checkpoint = folder / "checkpoint.safetensors"
        run = fit(
            algorithm, -(-chosen.n_updates // (1 + chosen.replay)), name=f"{method} {digest}" if folder else method,
            checkpoint=checkpoint, identity={"seed": seed, **asked["settings"], **asked}, progress=progress,
        )  # fmt: skip
        budget = Budget()
        budget.load_state_dict(algorithm.budget.state_dict())
        ours, theirs = _fresh(algorithm)
        words = RandomText(algorithm.teacher, algorithm.student, vocabulary, chosen, runtime)
        figures = {
            "agreement": agreement(ours, theirs),
            "agreement on words": agreement(*_fresh(words)),
            "classes named": len(theirs.unique()),
        }
        accuracy: dict[str, float] = {}
        if test_set is not None:
            there = test_set.to(runtime.device)
            for who, network in (("teacher", algorithm.teacher), ("student", algorithm.student)):
                accuracy[who] = agreement(predictions(network, there, runtime), labels_of(there))
    for line in told:
        warnings.warn(line, stacklevel=2)
    record = {
        "chapter": "distill_text",
        "profile": "",
        "parameters": asked,
        "seed": seed,
        **records.provenance(),
        "hardware": hardware(runtime.device),
        "runtime": runtime.describe(),
        "networks": {"teacher": count_parameters(teacher), "student": count_parameters(student)},
        "budget": budget.state_dict(),
        "seconds": round(run.seconds, 1),
        "resumed": resumed(run),
        "metrics": {
            f"distill_text/{method}/{measure}": value
            for measure, value in (figures | {f"{who} accuracy": value for who, value in accuracy.items()}).items()
        },
        "best": {},
        "warnings": told,
        "finished": records.now(),
    }
    for mine, given in zip(trained.parameters(), student.parameters(), strict=True):
        mine.requires_grad_(given.requires_grad)
    lending.like(trained, student)
    trained.eval()
    if folder:
        keep(trained, record, folder)
    return DistilledText(
        trained, figures["agreement"], figures["agreement on words"], int(figures["classes named"]), accuracy, budget,
        run.seconds, run, record,
    )  # fmt: skip


def _check_classifiers(teacher: Any, student: Any, settings: Distillation) -> int:
    """The number of classes, if both are sequence classifiers that embeddings can enter, and fit each other.

    Raises:
        InputError: what is missing, and of which.
    """
    for who, network in (("teacher", teacher), ("student", student)):
        taken = inspect.signature(network.forward).parameters
        missing = [name for name in ("inputs_embeds", "attention_mask", "output_hidden_states") if name not in taken]
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()) and "inputs_embeds" not in missing:
            missing = []
        missing += [name for name in ("get_input_embeddings", "base_model", "config") if not hasattr(network, name)]
        if missing:
            raise InputError(
                f"the {who}, a {type(network).__name__}, lacks {', '.join(missing)}; sentences enter as word "
                "embeddings, as a sequence classifier of transformers takes them"
            )
        if int(getattr(network.config, "num_labels", 1)) < 2 or (
            getattr(network.config, "problem_type", None) == "multi_label_classification"
        ):
            raise InputError(f"the {who} must tell two or more classes apart, one of them at a time")
        if settings.length > (most := most_positions(network)):
            raise InputError(f"length must be at most {most}, the {who}'s positions, not {settings.length}")
    if teacher.config.num_labels != student.config.num_labels:
        raise InputError(
            f"the teacher has {teacher.config.num_labels} classes, the student {student.config.num_labels}"
        )
    ours, theirs = word_table(student).shape, word_table(teacher).shape
    if ours != theirs:
        raise InputError(
            f"the student's word table is {list(ours)}, the teacher's {list(theirs)}; make the student of the "
            "teacher's layers, dfkd_lib.models.text.cut(teacher, 3), or with its vocabulary and embedding width"
        )
    for who, network in (("teacher", teacher), ("student", student)):
        _check_pass(network, who, int(teacher.config.num_labels))
    return int(teacher.config.num_labels)


def _check_pass(network: Any, who: str, n_classes: int) -> None:
    """Two sentences, one of them padded, with the mask as :func:`look` gives it and as transformers documents it."""
    table = word_table(network)
    e = table[torch.arange(4, device=table.device) % len(table)].expand(2, -1, -1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=table.device)
    with still(network):
        ours, _ = look(network, Sentences(e, mask, mask.bool()))
        documented = network(inputs_embeds=e, attention_mask=mask).logits.to(ours.dtype)
    if ours.shape != (2, n_classes):
        raise InputError(f"the {who} gives logits {list(ours.shape)} for 2 sentences, not [2, {n_classes}]")
    if not torch.allclose(ours, documented, rtol=1e-2, atol=1e-2):
        raise InputError(
            f"the {who}, a {type(network).__name__}, reads attention masks in a way of its own, so padding would "
            "count; BERT, DistilBERT, RoBERTa and ELECTRA do not"
        )


def _share_table(student: Any, teacher: Any) -> bool:
    """Give the student the teacher's word table for good; whether it had another."""
    own, table = student.get_input_embeddings().weight, word_table(teacher)
    other = not torch.equal(own.detach().cpu(), table.cpu())
    with torch.no_grad():
        own.copy_(table)
    own.requires_grad_(False)
    return other


def _test_set(
    test: tuple[Sequence[str], Sequence[int]], tokenizer: Any, vocabulary: Vocabulary, length: int, n_classes: int
) -> SentenceSet:
    written, labels = list(test[0]), torch.as_tensor(test[1]).long()
    if len(written) != len(labels) or not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise InputError(f"test must be texts and as many labels in 0..{n_classes - 1}, at least one")
    classes = [str(c) for c in range(n_classes)]
    return SentenceSet(
        encode(written, tokenizer, length), labels, vocabulary, classes=classes, name="test texts", split="test"
    )


def _fresh(source: TextDistiller) -> tuple[Tensor, Tensor]:
    """Classes that student and teacher name on sentences which the student has not seen; nothing is learnt."""
    named: tuple[list[Tensor], list[Tensor]] = ([], [])
    with in_eval_mode(source.student):
        for _ in range(-(-_FRESH // source.settings.batch_size)):
            # ZSKT's generator would take a step in construct()
            sentences = source.sample() if isinstance(source, ModifiedZSKT) else source.construct()[0]
            with torch.no_grad(), source.runtime.autocast():
                for network, found in zip((source.student, source.teacher), named, strict=True):
                    found.append(look(network, sentences)[0].argmax(1))
    return torch.cat(named[0])[:_FRESH], torch.cat(named[1])[:_FRESH]
