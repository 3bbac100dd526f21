"""The verifiable properties of AS-DFD."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import same, snapshot

pytest.importorskip("transformers")

from dfkd_lib.data import no_training_data, text
from dfkd_lib.errors import InputError
from dfkd_lib.losses import kl
from dfkd_lib.measures.evaluation import agreement
from dfkd_lib.methods import as_dfd, as_dfd_baselines, text_distiller
from dfkd_lib.methods.as_dfd import ASDFD, Settings
from dfkd_lib.methods.as_dfd_baselines import ModifiedZSKD, ModifiedZSKT, RandomText, RealText
from dfkd_lib.methods.text_distiller import Sentences, look
from dfkd_lib.models import text as networks
from dfkd_lib.training.finetuning import Recipe

SMALL = Settings(length=12, min_length=5, batch_size=6, craft_steps=4, eta=0.5, lr=1e-3, n_updates=20)
VOCABULARY = text.digit_vocabulary()


def teacher(layers: int = 3, n_classes: int = 5, scale: float = 8.0):
    """Random weights; a classifier scaled up, so that its classes can be told apart."""
    torch.manual_seed(0)
    made = networks.bert(VOCABULARY, n_classes, layers=layers, width=16, heads=2, positions=16)
    made.classifier.weight.data.mul_(scale)
    return made.eval()


def method(runtime, settings=SMALL, kind=ASDFD, k=2):
    source = teacher()
    return kind(source, networks.cut(source, k), VOCABULARY, settings, runtime)


def start_of(made):
    start, targets = made.sample_start(), made.sample_targets()
    at = torch.randint(len(made.norms), start.free.shape, generator=made.randomness)
    return start, targets, made.norms[at]


def test_embeddings_of_tokens_give_the_logits_of_tokens(float32):
    network = teacher()
    ids = torch.randint(4, 68, (3, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    by_ids = network(input_ids=ids, attention_mask=mask).logits
    by_rows, _ = look(network, Sentences(networks.word_table(network)[ids], mask, mask.bool()))
    assert torch.allclose(by_ids, by_rows, atol=1e-6)


def test_padding_changes_nothing_and_gets_no_gradient(float32):
    made = method(float32)
    start, targets, _ = start_of(made)
    e = start.e.clone().requires_grad_()
    logits, _ = look(made.teacher, Sentences(e, start.mask, start.free))
    (gradient,) = torch.autograd.grad(as_dfd.guess_loss(logits, targets), e)
    padded = start.mask == 0
    assert padded.any() and torch.count_nonzero(gradient[padded]) == 0
    changed = torch.where(padded[..., None], start.e + 5.0, start.e)
    assert torch.equal(look(made.teacher, Sentences(changed, start.mask, start.free))[0], logits)
    unmasked = Sentences(changed, torch.ones_like(start.mask), start.free)
    assert not torch.allclose(look(made.teacher, unmasked)[0], logits)


def test_constants_stay_bit_for_bit_and_rows_keep_their_norms(float32):
    made = method(float32)
    start, targets, norms = start_of(made)
    crafted, _ = made.craft(start, targets, norms)
    table, length = made.table, start.mask.sum(1)
    rows = torch.arange(6)
    assert torch.equal(crafted.e[:, 0], table[VOCABULARY.cls].expand(6, -1))
    assert torch.equal(crafted.e[rows, length - 1], table[VOCABULARY.sep].expand(6, -1))
    padded = start.mask == 0
    assert torch.equal(crafted.e[padded], table[VOCABULARY.pad].expand(int(padded.sum()), -1))
    assert crafted.e.shape == (6, 12, 16) and torch.isfinite(crafted.e).all() and not crafted.e.requires_grad
    assert torch.allclose(crafted.e[start.free].norm(dim=1), norms[start.free], atol=1e-5)
    assert not torch.equal(crafted.e[start.free], start.e[start.free])


def test_gradients_reach_the_embeddings_only(float32):
    made = method(float32, replace(SMALL, disagreement=1.0, lambda_ln=1.0))
    players = (made.teacher, made.student, made.head)
    before = [snapshot(player) for player in players]
    with no_training_data("AS-DFD"):
        made.construct()
    assert all(same(state, snapshot(player)) for state, player in zip(before, players, strict=True))
    assert all(p.grad is None for player in players for p in player.parameters())
    assert all(p.requires_grad for p in made.head.parameters())
    assert made.student.classifier.weight.requires_grad and made.student.training and not made.teacher.training


def test_what_the_encoder_sees_has_the_statistics_of_layer_norm(float64):
    made = method(float64)
    norm = made.teacher.base_model.embeddings.LayerNorm
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    e = 3 * start_of(made)[0].e
    embeddings = made.teacher.base_model.embeddings
    u = (embeddings(inputs_embeds=e) - norm.bias) / norm.weight
    assert u.mean(-1).abs().max() < 1e-6
    inner = u.var(-1, unbiased=False)
    assert (inner - 1).abs().max() < 1e-2  # the norm's epsilon, as rows are short here
    assert not torch.allclose(embeddings(inputs_embeds=e), embeddings(inputs_embeds=2 * e))
    places = embeddings.position_embeddings.weight[: e.shape[1]] + embeddings.token_type_embeddings.weight[0]
    assert torch.allclose(norm(e + places), embeddings(inputs_embeds=e))
    assert torch.allclose(norm(e + places), norm(7 * (e + places)), atol=1e-3)


def test_the_plain_run_is_the_method_without_its_weights(float32):
    off = replace(SMALL, beta=0.0, lambda_ss=0.0)
    one, other = method(float32, off), method(float32, off)
    other.masks.manual_seed(99)  # masks are drawn from a stream of their own, which a plain run never touches
    for _ in range(3):
        one.step(), other.step()
    assert same(snapshot(one.student), snapshot(other.student))
    adversarial = method(float32)
    assert torch.equal(one.__class__.sample_start(method(float32, off)).e, adversarial.sample_start().e)


def test_sentences_do_not_see_each_other(float64):
    made = method(float64, replace(SMALL, beta=0.0))
    start, targets, norms = start_of(made)
    together, _ = made.craft(start, targets, norms)
    for b in range(len(targets)):
        part = slice(b, b + 1)
        alone, _ = made.craft(Sentences(start.e[part], start.mask[part], start.free[part]), targets[part], norms[part])
        assert torch.allclose(alone.e[0], together.e[b], atol=1e-5)


def of_two_minds(keep="first"):
    """A teacher and a student of two of its three layers that do not agree, without dropout."""
    source = teacher(scale=100.0)
    student = networks.cut(source, 2, keep, dropout=0.0)
    student.classifier.bias.data.normal_()
    return source, student


def ss_by_hand(made, sentences, hidden):
    """1/|M| sum over M of 1 - cos(A(h), e), position by position."""
    e = torch.where(hidden[..., None], made.table[VOCABULARY.mask], sentences.e)
    states = made.student(inputs_embeds=e, attention_mask=sentences.mask, output_hidden_states=True).hidden_states
    predicted = made.head(states[-1])
    terms = [
        1 - (a * e).sum() / (a.norm() * e.norm()) for a, e in zip(predicted[hidden], sentences.e[hidden], strict=True)
    ]
    return sum(terms) / len(terms)


def kl_by_hand(student, teacher, tau=1.0):
    """tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over the batch."""
    p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
    return tau**2 * (p * (p / q).log()).sum() / len(p)


def hidden_next(made, free):
    """The positions that the next call will hide."""
    drawn = torch.Generator().manual_seed(0)
    drawn.set_state(made.masks.get_state())
    return text_distiller.hidden_positions(free, made.settings.mask_rate, drawn)


def test_the_construction_loss_is_the_sum_of_its_terms(float64):
    settings = replace(SMALL, lambda_ln=0.3, beta=0.7, disagreement=0.2)
    made = ASDFD(*of_two_minds(), VOCABULARY, settings, float64)
    start, targets, _ = start_of(made)
    rows = {"inputs_embeds": start.e, "attention_mask": start.mask}
    t, s = made.teacher(**rows).logits, made.student(**rows).logits
    guess = sum(-(t[b].softmax(0)[y].log()) for b, y in enumerate(targets))
    u = made.teacher.base_model.embeddings(inputs_embeds=start.e)[start.free]
    mean, std = made.statistics
    norm = sum((u[:, d].mean() - mean[d]) ** 2 + (u[:, d].std(correction=0) - std[d]) ** 2 for d in range(16)) / 16
    understood = ss_by_hand(made, start, hidden_next(made, start.free))
    early = made.construction_loss(start, targets, {"guess": [], "hit": []}, settled=False)
    assert early.item() == pytest.approx(float(guess + 6 * 0.3 * norm), rel=1e-9)
    late = made.construction_loss(start, targets, {"guess": [], "hit": []}, settled=True)
    by_hand = guess + 6 * (0.3 * norm - 0.7 * understood - 0.2 * kl_by_hand(s, t))
    assert late.item() == pytest.approx(float(by_hand), rel=1e-9)


def test_the_student_s_loss_is_the_sum_of_its_terms(float64, monkeypatch):
    settings = replace(SMALL, temperature=3.0, lambda_ss=0.7, lambda_pt=0.3)
    made = ASDFD(*of_two_minds("spaced"), VOCABULARY, settings, float64)
    sentences, _, _ = start_of(made)
    rows = {"inputs_embeds": sentences.e, "attention_mask": sentences.mask, "output_hidden_states": True}
    s, t = made.student(**rows), made.teacher(**rows)
    patient = 0.0
    for ours, theirs in ((1, 2), (2, 3)):  # layers 1 and 2 of the teacher, after the embeddings
        apart = [h.hidden_states[i][:, 0] for h, i in ((s, ours), (t, theirs))]
        patient += sum((a / a.norm() - b / b.norm()).square().sum() for a, b in zip(*apart, strict=True)) / 6
    understood = ss_by_hand(made, sentences, hidden_next(made, sentences.free))
    by_hand = kl_by_hand(s.logits, t.logits, 3.0) + 0.7 * understood + 0.3 * patient
    found = []
    monkeypatch.setattr(text_distiller, "update", lambda optimizer, loss, scaler, clip: found.append(float(loss)))
    made.learn(sentences, made.ask(sentences))
    assert found == [pytest.approx(float(by_hand), rel=1e-9)]


def test_zskd_and_zskt_descend_on_their_own_losses(float64, monkeypatch):
    made = method(float64, kind=ModifiedZSKD)
    start, targets, _ = start_of(made)
    t = made.teacher(inputs_embeds=start.e, attention_mask=start.mask).logits
    loss = made.construction_loss(start, targets, {"guess": [], "hit": []}, settled=True)
    assert float(loss) == pytest.approx(float(-(targets * (t / 20).softmax(1).log()).sum()), rel=1e-9)
    made = ModifiedZSKT(*of_two_minds(), VOCABULARY, SMALL, float64)
    drawn, found = [], []
    monkeypatch.setattr(made, "sample", lambda sample=made.sample: drawn.append(sample()) or drawn[-1])
    monkeypatch.setattr(as_dfd_baselines, "update", lambda optimizer, loss, scaler, clip: found.append(float(loss)))
    made.construct()
    rows = {"inputs_embeds": drawn[0].e, "attention_mask": drawn[0].mask}
    by_hand = -kl_by_hand(made.student(**rows).logits, made.teacher(**rows).logits)
    assert found == [pytest.approx(float(by_hand), rel=1e-9)]


def test_a_crafting_step_moves_free_entries_by_eta_table_deviations(float64):
    made = method(float64, replace(SMALL, craft_steps=1, norm_project=False, beta=0.0, eta=0.7))
    start, targets, norms = start_of(made)
    moved = (made.craft(start, targets, norms)[0].e - start.e).abs()
    size = float(made.table[made.ordinary].std(0).mean())
    assert moved[start.free].median().item() == pytest.approx(0.7 * size, rel=1e-3)
    assert not moved[~start.free].any()


@pytest.mark.parametrize("norm_project", [True, False])
def test_rows_are_brought_back_to_their_norms_only_if_asked(float64, norm_project):
    made = method(float64, replace(SMALL, norm_project=norm_project))
    start, targets, norms = start_of(made)
    found = made.craft(start, targets, norms)[0].e.norm(dim=-1)[start.free]
    assert torch.allclose(found, norms[start.free].to(found)) is norm_project


@pytest.mark.parametrize("steps", [4, 5])
def test_the_adversary_plays_in_the_second_half_against_a_student_that_stays_as_it_is(float64, monkeypatch, steps):
    made = method(float64, replace(SMALL, craft_steps=steps))
    seen = []

    def watched(sentences, targets, trace, settled, loss=made.construction_loss):
        seen.append((settled, made.student.training, any(p.requires_grad for p in made.student.parameters())))
        return loss(sentences, targets, trace, settled)

    monkeypatch.setattr(made, "construction_loss", watched)
    made.construct()
    assert seen == [(i >= steps // 2, False, False) for i in range(steps)]
    assert made.student.training and any(p.requires_grad for p in made.student.parameters())


def test_the_student_s_rate_falls_along_half_a_cosine(float32):
    made = method(float32, replace(SMALL, n_updates=4, craft_steps=1))
    rates = []
    for _ in range(5):
        made.step()
        rates.append(made.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)], abs=1e-12)


def test_zskt_s_generator_learns_once_in_ten_batches_from_a_student_in_eval_mode(float32):
    made = method(float32, kind=ModifiedZSKT)
    modes = []
    made.student.register_forward_pre_hook(lambda *_: modes.append(made.student.training))
    learned = []
    for made.steps in range(21):
        learned.append("disagreement" in made.construct()[1])
    assert [i for i, flag in enumerate(learned) if flag] == [0, 10, 20]
    assert modes == [False] * 3 and made.student.training


def test_sentences_without_padding_need_no_mask(float64):
    made = method(float64, replace(SMALL, min_length=12))
    start = made.sample_start()
    assert start.mask is None
    masked = Sentences(start.e, torch.ones(6, 12, dtype=torch.int64), start.free)
    assert torch.allclose(look(made.teacher, start)[0], look(made.teacher, masked)[0])


def test_the_adversary_raises_the_self_supervised_loss(float64):
    made = method(float64)
    start, _, _ = start_of(made)
    made.student.eval()

    def loss(e, state):
        made.masks.set_state(state)
        return made.understanding(Sentences(e, start.mask, start.free), moving_target=True)

    state = made.masks.get_state()
    e = start.e.clone().requires_grad_()
    before = loss(e, state)
    (gradient,) = torch.autograd.grad(before, e)
    assert loss(e.detach() + 0.05 * gradient / gradient.norm(), state) > before.detach()
    assert 0 <= float(before.detach()) <= 2


@pytest.mark.parametrize("moving_target", [True, False])
def test_hidden_embeddings_are_reached_as_targets_alone(float64, moving_target):
    made = method(float64)
    start, _, _ = start_of(made)
    hidden = hidden_next(made, start.free)
    e = start.e.clone().requires_grad_()
    understood = made.understanding(Sentences(e, start.mask, start.free), moving_target=moving_target)
    (gradient,) = torch.autograd.grad(understood, e)
    assert bool(gradient[hidden].any()) is moving_target and gradient[start.free & ~hidden].any()


def test_the_mask_set_is_inside_the_free_positions(float32):
    free = method(float32).sample_frame().free
    hidden = text_distiller.hidden_positions(free, 0.05, torch.Generator().manual_seed(0))
    assert (hidden <= free).all() and hidden.any(1).all()


def test_a_perfect_prediction_costs_nothing():
    e = torch.randn(2, 4, 8)
    hidden = torch.ones(2, 4, dtype=torch.bool)
    assert text_distiller.self_supervised_loss(3 * e, e, hidden).abs() < 1e-6
    assert text_distiller.self_supervised_loss(-e, e, hidden) == pytest.approx(2.0, abs=1e-5)


def test_a_student_of_all_layers_has_nothing_to_learn(float64):
    made = method(float64, k=3)
    made.student.eval()
    start, _, _ = start_of(made)
    ours, theirs = look(made.student, start)[0], look(made.teacher, start)[0]
    assert torch.equal(ours, theirs)
    loss = kl(ours, theirs)
    loss.backward()
    assert loss.abs() < 1e-6
    assert all(p.grad is None or p.grad.abs().max() < 1e-9 for p in made.student.parameters())


def test_at_a_high_temperature_kl_is_the_distance_of_centred_logits():
    s, t = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    apart = (t - t.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True))
    assert float(kl(s, t, 1000.0)) == pytest.approx(float(apart.square().sum(1).mean() / 10), rel=5e-3)


def test_the_embedding_module_stays_equal_and_the_teacher_bitwise_unchanged(float32):
    made = method(float32, replace(SMALL, replay=1, lambda_pt=1.0))
    before = snapshot(made.teacher)
    student_before = snapshot(made.student)
    for _ in range(3):
        made.step()
    assert same(before, snapshot(made.teacher))
    assert same(snapshot(made.student.base_model.embeddings), snapshot(made.teacher.base_model.embeddings))
    assert not same(student_before, snapshot(made.student))
    assert made.budget.student_updates == 6 and made.budget.images == 18


@pytest.mark.parametrize("memory", [1, 2])
def test_only_the_last_batches_are_kept_for_replay(float32, memory):
    made = method(float32, replace(SMALL, replay=1, memory=memory))
    latest = []
    for _ in range(4):
        made.step()
        latest.append(made.kept[-1]["e"])
    assert len(made.kept) == memory
    assert all(torch.equal(kept["e"], e) for kept, e in zip(made.kept, latest[-memory:], strict=True))


def test_true_rows_decode_to_their_tokens(float32):
    table = networks.word_table(teacher())
    ids = torch.randint(4, 68, (2, 7))
    found, cosines = networks.nearest_tokens(table[ids], table, VOCABULARY.ordinary)
    assert torch.equal(found, ids) and torch.allclose(cosines, torch.ones(2, 7), atol=1e-5)


def test_zskd_concentrations_and_targets():
    rows = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)], [-3.0, 0.0]])  # cosines 1/2, -1 and -1/2
    wanted = torch.tensor([[1, 3 / 4, 1e-3], [2 / 3, 1, 1e-3], [1e-3, 1 / 4, 1]], dtype=torch.float64)
    assert torch.allclose(as_dfd_baselines.class_similarities(rows), wanted, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    beliefs = as_dfd.dirichlet(torch.tensor([2.0, 1.0, 1e-4]).expand(4000, 3), generator)
    assert torch.allclose(beliefs.sum(1), torch.ones(4000, dtype=torch.float64)) and torch.isfinite(beliefs).all()
    assert torch.allclose(beliefs.mean(0)[:2], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64), atol=0.02)
    assert float(beliefs[:, 0].var()) == pytest.approx(2 / 36, rel=0.1)


def test_random_text_is_framed_ordinary_words(float32):
    sentences, _ = method(float32, kind=RandomText).construct()
    ids, cosines = networks.nearest_tokens(sentences.e, method(float32).table, VOCABULARY.ordinary)
    assert (ids[sentences.free] >= 4).all() and cosines[sentences.free].min() > 0.999


def test_the_same_seed_gives_the_same_embeddings(float32):
    first, again = method(float32).construct()[0].e, method(float32).construct()[0].e
    other = method(replace(float32, seed=1)).construct()[0].e
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_real_text_is_not_data_free(float32):
    sentences = text.load("digit_sentences", "fit", length=10, limit=32)
    source = teacher(n_classes=10)
    made = RealText(source, networks.cut(source, 1), sentences, replace(SMALL, lambda_ss=0.0), float32)
    assert not made.data_free and ASDFD.data_free
    made.step()
    assert made.budget.student_updates == 1


def test_bad_settings_are_refused(float32):
    for wrong in ({"start": "noise"}, {"min_length": 2}, {"mask_rate": 1.0}, {"eta": 0.0}, {"targets": "hard"}):
        with pytest.raises(InputError):
            replace(SMALL, **wrong)
    with pytest.raises(InputError, match="positions"):
        method(float32, replace(SMALL, length=40))
    other = networks.bert(VOCABULARY, 5, layers=1, width=8, heads=2, positions=16)
    with pytest.raises(InputError, match="word table"):
        ASDFD(teacher(), other, VOCABULARY, SMALL, float32)


def test_a_few_steps_make_the_teacher_sure_and_the_student_learn(float32):
    torch.manual_seed(0)
    train, test = (text.load("digit_sentences", split, length=10) for split in ("fit", "test"))
    recipe = Recipe(layers=2, width=32, heads=2, epochs=6, batch_size=32, lr=3e-3, hidden=0.0, dropout=0.0)
    source = networks.train_or_load(train, test, recipe, float32).module
    settings = replace(SMALL, length=10, min_length=10, batch_size=32, craft_steps=5, eta=1.0, n_updates=40)
    student = networks.cut(source, 1)
    made = ASDFD(source, student, VOCABULARY, settings, float32)
    _, trace = made.craft(*start_of(made))
    guesses = [float(value) for value in trace["guess"]]
    assert all(later < earlier for earlier, later in pairwise(guesses)) and float(trace["hit"][-1]) > 0.8
    truth = networks.predictions(source, test, float32)
    before = agreement(networks.predictions(student, test, float32), truth)
    for _ in range(40):
        made.step()
    after = agreement(networks.predictions(student, test, float32), truth)
    assert after > before + 0.1
    assert F.one_hot(truth).shape[1] == 10


@pytest.mark.parametrize("kind", [ASDFD, RandomText, ModifiedZSKT])
def test_a_pool_shares_out_the_same_lengths_and_pads_less(float32, kind):
    pooled = replace(SMALL, pool=4, batch_size=8, min_length=3)
    made = method(float32, pooled, kind=kind)
    lengths, widths = [], []
    for made.steps in range(4):
        sentences, _ = made.construct()
        lengths += sentences.mask.sum(1).tolist()
        widths.append(sentences.e.shape[1])
        assert widths[-1] == max(lengths[-8:]) and sentences.free.sum(1).tolist() == [n - 2 for n in lengths[-8:]]
    assert len(set(widths)) > 1 and set(lengths) <= set(range(3, 13)) and len(set(lengths)) > 6
    again = method(float32, pooled, kind=kind)
    again.steps = 3  # as after a checkpoint
    assert again.sample_frame().mask.sum(1).tolist() == lengths[-8:]
    with pytest.raises(InputError, match="pool"):
        replace(SMALL, pool=0)


def test_a_batch_that_ends_with_its_longest_is_the_same_batch(float32):
    made = method(float32)
    lengths = torch.tensor([5, 7])
    short, long = made.frame(lengths, 7), made.frame(lengths)
    rows = torch.randn_like(long.e)
    logits = [look(made.teacher, s.with_rows(rows[:, : s.e.shape[1]]))[0] for s in (short, long)]
    assert torch.allclose(*logits, atol=1e-6)


def test_random_words_learn_the_self_supervised_loss_as_well(float32):
    made = method(float32, kind=RandomText)
    assert "self-supervised" in made.step()
    assert "self-supervised" not in method(float32, replace(SMALL, lambda_ss=0.0), kind=RandomText).step()
