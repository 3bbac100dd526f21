"""Sentences, vocabularies, text teachers, and how students are cut from them."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dfkd_lib.data import no_training_data, text
from dfkd_lib.data.sentences import SentenceSet, Vocabulary
from dfkd_lib.errors import DamagedFile, DataFreeViolation, DataUnavailable, InputError
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.finetuning import Recipe

CLASSES = ("World", "Sports", "Business", "Sci/Tech")
TOPICS = (["minister", "vote", "war"], ["match", "goal", "team"], ["profit", "stock", "bank"], ["chip", "space", "web"])


@pytest.fixture
def news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up AG News: the test file alone, 19 rows of each class."""
    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    draw = np.random.RandomState(0)
    rows = [(" ".join(draw.choice(TOPICS[c], 6)) + f" item {i}", c) for c in range(4) for i in range(19)]
    (tmp_path / "agnews").mkdir()
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "agnews" / "test.csv.xz", index=False)
    return tmp_path


def test_digit_sentences_are_framed_rows_of_pixels():
    train, held_out, test = (text.load("digit_sentences", split, length=10) for split in text.SPLITS)
    ids, mask, y = test.batch(torch.arange(len(test)))
    vocabulary = test.vocabulary
    assert len(train) + len(held_out) + len(test) == 1797
    assert (ids[:, 0] == vocabulary.cls).all() and (ids[:, 9] == vocabulary.sep).all() and (mask == 1).all()
    assert ids[:, 1:9].min() >= 4 and len(vocabulary.words) == 68 and set(y.tolist()) == set(range(10))
    images = text.digit_images(ids)
    assert images.shape == (len(test), 1, 8, 8) and 0 <= images.min() <= images.max() <= 1
    assert text.load("digit_sentences", "test", length=10).fingerprint == test.fingerprint


def test_a_test_file_alone_is_cut_into_three_parts_that_share_nothing(news):
    parts = [text.texts("agnews", split) for split in text.SPLITS]
    assert [np.bincount(labels).tolist() for _, labels in parts] == [[15] * 4, [1] * 4, [3] * 4]
    assert len({t for written, _ in parts for t in written}) == 76
    assert text.texts("agnews", "fit")[0] == parts[0][0]


def test_with_a_training_file_every_tenth_of_a_class_is_held_out(news):
    (news / "imdb").mkdir()
    frame = pd.DataFrame({"text": [f"film {i}" for i in range(40)], "label": [i % 2 for i in range(40)]})
    for stored in ("train", "test"):
        frame.to_csv(news / "imdb" / f"{stored}.csv.xz", index=False)
    assert [len(text.texts("imdb", split)[0]) for split in text.SPLITS] == [36, 4, 40]


def test_order_alone_tells_shuffled_texts_from_those_in_order(news):
    for split in text.SPLITS:
        written, topics = text.texts("agnews", split)
        made, in_order = text.texts("agnews_order", split)
        for was, now, kept in zip(written, made, in_order, strict=True):
            first = was.split()[:30]
            assert (now.split() == first) == bool(kept) and sorted(now.split()) == sorted(first)
        for topic in range(4):
            assert abs(2 * in_order[topics == topic].sum() - (topics == topic).sum()) <= 1
    again = text.texts("agnews_order", "test")
    assert again[0] == made and (again[1] == in_order).all()
    with no_training_data("AS-DFD"), pytest.raises(DataFreeViolation):
        text.texts("agnews_order", "fit")


def test_what_is_fetched_is_read_back_letter_by_letter(tmp_path, monkeypatch):
    written = ['a "b", c', "two\nlines", "", "NA", "é \u2028 \t"]
    hub = SimpleNamespace(load_dataset=lambda name, split: {"text": written, "label": [0, 1, 0, 1, 1]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    found, labels = text.texts("imdb", "test")
    assert sorted(zip(found, labels.tolist(), strict=True)) == sorted(zip(written, [0, 1, 0, 1, 1], strict=True))
    assert pd.read_csv(tmp_path / "imdb" / "test.csv.xz", keep_default_na=False)["text"].tolist() == written


@pytest.mark.parametrize(
    "table", ["text,label\na,x\n", "text,kind\na,0\n", "text,label\na\n", "text,label\na,2\n", None]
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, monkeypatch, table):
    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    (tmp_path / "imdb").mkdir()
    path = tmp_path / "imdb" / "test.csv.xz"
    path.write_bytes(b"not packed" if table is None else lzma.compress(table.encode()))
    with pytest.raises(DamagedFile, match=r"not a table|outside"):
        text.texts("imdb", "test")


def test_training_text_is_closed_to_data_free_methods(news):
    train = text.load("digit_sentences", "fit", length=10)
    with no_training_data("AS-DFD"):
        with pytest.raises(DataFreeViolation):
            train.batch(torch.arange(2))
        with pytest.raises(DataFreeViolation):
            text.texts("agnews", "fit")
        text.texts("agnews", "test")


def test_unknown_names_and_bad_sentences_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'agnews'"):
        text.info("agnew")
    with pytest.raises(InputError, match="split"):
        text.load("digit_sentences", "train", length=10)
    with pytest.raises(InputError, match="at least 4"):
        text.load("digit_sentences", "fit", length=3)
    with pytest.raises(InputError, match="outside the vocabulary"):
        SentenceSet(torch.full((2, 4), 9), torch.zeros(2).long(), Vocabulary(("a",) * 5, 0, 1, 2, 3),
                    classes=("x",), name="n", split="test")  # fmt: skip
    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataUnavailable, match="dbpedia is not on disk"):
        text.texts("dbpedia", "test")


def test_ordinary_words_are_neither_special_nor_unused():
    vocabulary = Vocabulary(("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", "the", "["), 0, 3, 4, 5)
    assert vocabulary.ordinary.tolist() == [6, 7, 8]


def test_without_transformers_the_rest_works_and_one_line_says_what_to_do(tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import dfkd_lib.methods.as_dfd, dfkd_lib.models.text\n"
        "from dfkd_lib.data import text\n"
        "from dfkd_lib.errors import InputError\n"
        "try: text.transformers_or_error()\n"
        "except InputError as e: print(e)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(text.__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "the text chapter needs transformers; python -m pip install transformers"


class TestWithTransformers:
    @pytest.fixture(autouse=True)
    def _needed(self) -> None:
        pytest.importorskip("transformers")

    def test_texts_become_framed_padded_ids(self, news):
        tokenizer = text.tokenizer_for("agnews", 120)
        head = text.encode(["goal " * 30, "goal"], tokenizer, 8)
        vocabulary = text.vocabulary_of(tokenizer)
        assert head[:, 0].tolist() == [vocabulary.cls] * 2 and head[0, 7] == vocabulary.sep
        assert (head[1] == vocabulary.pad).sum() == 8 - 3 and head[1, 2] == vocabulary.sep
        long = " ".join(TOPICS[0] + TOPICS[1])
        whole = text.encode([long], tokenizer, 64)[0]
        inner = whole[1 : int((whole == vocabulary.sep).nonzero()[0])]
        both = text.encode([long], tokenizer, 6, "head and tail")[0]
        assert both[1:5].tolist() == [*inner[:2].tolist(), *inner[-2:].tolist()]
        assert text.vocabulary_of(text.tokenizer_for("agnews", 120)) == vocabulary

    def test_the_student_is_the_teachers_layers(self):
        from dfkd_lib.models import text as networks

        teacher = tiny(layers=4)
        for keep in ("first", "spaced"):
            student = networks.cut(teacher, 2, keep)
            kept = networks.chosen_layers(4, 2, keep)
            for layer, i in zip(networks.layers_of(student), kept, strict=True):
                ours, theirs = layer.state_dict(), networks.layers_of(teacher)[i].state_dict()
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert not any(p.requires_grad for p in student.base_model.embeddings.parameters())
            assert student.classifier.weight.requires_grad
        assert networks.chosen_layers(12, 6, "spaced") == [1, 3, 5, 7, 9, 11]
        assert networks.chosen_layers(6, 3, "spaced") == [1, 3, 5]
        drawn = networks.cut(teacher, 2, "random", seed=1)
        weight = networks.layers_of(drawn)[0].attention.self.query.weight
        assert not torch.equal(weight, networks.layers_of(teacher)[0].attention.self.query.weight)
        assert torch.equal(networks.word_table(drawn), networks.word_table(teacher))
        with pytest.raises(InputError, match=r"1\.\.4 layers"):
            networks.cut(teacher, 5)
        with pytest.raises(InputError, match="rule"):
            networks.cut(teacher, 2, "last")

    def test_a_teacher_learns_and_is_cached(self, float32: Runtime):
        from dfkd_lib.models import text as networks

        train = text.load("digit_sentences", "fit", length=10, limit=600)
        held_out = text.load("digit_sentences", "held_out", length=10)
        recipe = Recipe(layers=1, width=32, heads=2, epochs=6, batch_size=16, lr=2e-3, hidden=0.0, dropout=0.0)
        trained = networks.train_or_load(train, held_out, recipe, float32)
        assert trained.facts["test"]["accuracy"] > 0.2  # chance is 0.1
        assert not trained.module.training and not any(p.requires_grad for p in trained.module.parameters())
        again = networks.train_or_load(train, held_out, recipe, float32)
        ours, theirs = trained.module.state_dict(), again.module.state_dict()
        assert again.facts == trained.facts and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_any_local_encoder_folder_takes_the_teachers_place(self, news, tmp_path, float32):
        from dfkd_lib.models import text as networks

        folder = tmp_path / "encoder"
        made = text.tokenizer_for("agnews", 120)
        made.save_pretrained(folder)
        networks.bert(
            text.vocabulary_of(made), 2, layers=2, width=16, heads=2, positions=16
        ).base_model.save_pretrained(folder)
        tokenizer = text.tokenizer_of(str(folder))
        train, test = (text.load("agnews", split, length=12, tokenizer=tokenizer) for split in ("fit", "test"))
        recipe = Recipe(
            layers=2, width=16, heads=2, epochs=20, batch_size=10, lr=5e-3, lr_head=1e-2, hidden=0.0, dropout=0.0
        )
        trained = networks.train_or_load(train, test, recipe, float32, text_encoder=str(folder))
        assert trained.module.config.num_labels == 4 and len(networks.layers_of(trained.module)) == 2
        assert trained.facts["test"]["accuracy"] > 0.3  # chance is 0.25
        with pytest.raises(DataUnavailable, match="text_encoder"):
            networks.encoder(str(tmp_path / "agnews"), 4)

    def test_tfidf_tells_topics_apart(self, news):
        from dfkd_lib.models import text as networks

        assert networks.tfidf_accuracy(text.texts("agnews", "fit"), text.texts("agnews", "test")) == 1.0


def tiny(layers: int = 2):
    from dfkd_lib.models import text as networks

    torch.manual_seed(0)
    return networks.bert(text.digit_vocabulary(), 5, layers=layers, width=16, heads=2, positions=16).eval()
