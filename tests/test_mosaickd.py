"""The verifiable properties of MosaicKD."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import classifier
from torch import Tensor, nn

from dfkd_lib import data, losses, models
from dfkd_lib.errors import DataFreeViolation, InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods import mosaickd, out_of_domain
from dfkd_lib.methods.mosaickd import DataFreeGame, MosaicKD, Settings
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

SMALL = Settings(latent_dim=6, batch_size=8, kd_steps=3, n_steps=10, pad=1, lr_student=0.05)
PIXELS = {"mean": [0.3], "std": [0.4]}


def at_hand(n: int = 30) -> data.ImageSet:
    random = torch.Generator().manual_seed(5)
    return data.ImageSet(torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=random), name="x", split="train")


def players(seed: int = 0, name: str = "patch5") -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(seed)
    shape = (1, 8, 8)
    made = models.build_generator("toolbox_large", latent_dim=6, image_shape=shape, ngf=2, **PIXELS)
    return classifier(8), classifier(4), made, models.build_discriminator(name, image_shape=shape, ndf=4, **PIXELS)


def game(runtime: Runtime, settings: Settings = SMALL, seed: int = 0) -> MosaicKD:
    return MosaicKD(*players(seed), at_hand(), settings, runtime)


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def all_state(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


# --- losses ---


def test_losses_of_silent_patches_are_k_ln_2():
    zero = torch.zeros(4, 1, 8, 8)
    for value in (mosaickd.discriminator_loss(zero, zero), mosaickd.local_loss(zero)):
        assert value.item() == pytest.approx(64 * math.log(2), rel=1e-6) and round(value.item(), 3) == 44.361
    assert mosaickd.local_loss(zero, "mean").item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_sum_over_patches_is_k_times_their_mean_and_batches_are_averaged():
    d, real = torch.randn(5, 1, 3, 4, dtype=torch.float64), torch.randn(5, 1, 3, 4, dtype=torch.float64)
    assert torch.isclose(mosaickd.local_loss(d), 12 * mosaickd.local_loss(d, "mean"))
    assert torch.isclose(mosaickd.discriminator_loss(d, real), 12 * mosaickd.discriminator_loss(d, real, "mean"))
    assert torch.isclose(mosaickd.local_loss(d), mosaickd.local_loss(torch.cat([d, d])))
    assert torch.isclose(mosaickd.local_loss(d), (1 + (-d).exp()).log().sum() / 5)
    by_hand = ((1 + d.exp()).log().sum() + (1 + (-real).exp()).log().sum()) / 10
    assert torch.isclose(mosaickd.discriminator_loss(d, real), by_hand)


def test_alignment_is_the_entropy_with_its_bounds_and_gradient():
    assert mosaickd.alignment_loss(torch.zeros(3, 7)).item() == pytest.approx(math.log(7))
    certain = torch.zeros(3, 7)
    certain[:, 2] = 500
    assert mosaickd.alignment_loss(certain).item() == 0
    t = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    mosaickd.alignment_loss(t).backward()
    p = t.detach().softmax(1)
    h = -(p * p.log()).sum(1, keepdim=True)
    assert torch.allclose(t.grad, -p * (p.log() + h) / 4)
    assert ((t.detach() - 0.1 * t.grad).softmax(1).amax(1) > p.amax(1)).all()


def test_balance_is_in_bits_least_when_even_and_blind_to_names():
    t = torch.randn(6, 8, dtype=torch.float64)
    value = mosaickd.balance_loss(t)
    assert -3 <= value <= 0 and torch.isclose(value, mosaickd.balance_loss(t[:, torch.randperm(8)]))
    even = torch.zeros(6, 8, requires_grad=True)
    lowest = mosaickd.balance_loss(even)
    lowest.backward()
    assert lowest.item() == pytest.approx(-3) and even.grad.abs().max() < 1e-7


def test_the_adversarial_term_is_zero_only_for_equal_beliefs():
    s = torch.randn(4, 5, dtype=torch.float64)
    assert mosaickd.adversarial_loss(s, torch.randn(4, 5, dtype=torch.float64)) < 0
    assert mosaickd.adversarial_loss(s, s + torch.randn(4, 1, dtype=torch.float64)).abs() < 1e-12
    network = classifier(8).double().eval()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    mosaickd.adversarial_loss(copy.deepcopy(network)(x), network(x)).backward()
    assert x.grad.abs().max() < 1e-12


def test_distillation_ignores_constants_and_has_its_warm_limit():
    s, t = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.isclose(losses.kl(s, t, 5.0), losses.kl(s + 3, t - torch.ones(4, 1), 5.0))
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert losses.kl(s, t, 1e3).item() == pytest.approx(centred.square().sum().item() / (2 * 5 * 4), rel=1e-2)


def test_for_segmentation_every_loss_averages_over_pixels():
    t = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    s = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    flat_t, flat_s = (x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (t, s))
    assert torch.isclose(mosaickd.alignment_loss(t), mosaickd.alignment_loss(flat_t))
    assert torch.isclose(mosaickd.balance_loss(t), mosaickd.balance_loss(flat_t))
    assert torch.isclose(mosaickd.adversarial_loss(s, t), mosaickd.adversarial_loss(flat_s, flat_t))


# --- the game ---


def test_the_players_move_in_order_each_by_itself(float32, monkeypatch):
    """D, then G through the updated D on the same images, then the student; learning rates follow the cosine."""
    method = game(float32)
    seen: list[str] = []
    who = {"D": method.discriminator, "G": method.generator, "S": method.student}
    before = {name: parameters(module) for name, module in who.items()}
    fakes: dict[str, Tensor] = {}

    def traced(name, step, mover):
        def call(*images):
            if images:
                fakes[name] = images[0].detach().clone()
                assert images[0].requires_grad is (name == "generate")
            result = step(*images)
            seen.append(name)
            assert [k for k, module in who.items() if moved(module, before[k])] == [mover]
            before.update({k: parameters(module) for k, module in who.items()})
            return result

        return call

    for name, mover in (("discriminate", "D"), ("generate", "G"), ("imitate", "S")):
        monkeypatch.setattr(method, name, traced(name, getattr(method, name), mover))
    method.step()
    assert seen == ["discriminate", "generate", "imitate", "imitate", "imitate"]
    assert torch.equal(fakes["discriminate"], fakes["generate"])
    method.step()
    factor = 0.5 * (1 + math.cos(math.pi / 10))
    for optimizer, lr in (
        (method.student_optimizer, 0.05),
        (method.generator_optimizer, 1e-3),
        (method.discriminator_optimizer, 1e-3),
    ):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * factor)


def kl_by_hand(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
    return tau**2 * (p * (p / q).log()).sum() / len(p)


def test_defaults_are_the_published_values(float32):
    settings = Settings()
    assert (settings.loc, settings.align, settings.adv, settings.balance) == (1.0, 1.0, 1.0, 10.0)
    assert (settings.lr_student, settings.lr_generator, settings.lr_discriminator) == (0.1, 1e-3, 1e-3)
    assert (settings.temperature, settings.reduction, settings.kd_steps) == (1.0, "sum", 5)
    method = game(float32)
    for optimizer in (method.generator_optimizer, method.discriminator_optimizer):
        assert optimizer.defaults["betas"] == (0.5, 0.999)


def test_each_player_descends_on_the_sum_of_its_terms(float64, monkeypatch):
    weights = {"loc": 0.3, "align": 0.7, "adv": 1.3, "balance": 2.1, "temperature": 3.0}
    method = game(float64, replace(SMALL, **weights))
    found: list[float] = []
    monkeypatch.setattr(mosaickd, "update", lambda optimizer, loss, scaler: found.append(float(loss)))
    fake = method.generator(method.sample_noise())
    real = method.images.batch(method.judged(0))[0].double()
    sp = lambda u: (1 + u.exp()).log()  # noqa: E731
    method.discriminate(fake.detach())
    on_fake, on_real = method.discriminator(fake), method.discriminator(real)
    assert found[0] == pytest.approx(float(0.3 / (2 * 8) * (sp(on_fake).sum() + sp(-on_real).sum())), rel=1e-9)
    method.generate(fake)
    t, s = method.teacher(fake), method.student(fake)
    p = t.softmax(1)
    entropy, mean = -(p * p.log()).sum() / 8, p.mean(0)
    by_hand = 0.3 * sp(-on_fake).sum() / 8 + 0.7 * entropy - 1.3 * kl_by_hand(s, t) + 2.1 * (mean * mean.log2()).sum()
    assert found[1] == pytest.approx(float(by_hand), rel=1e-9)
    seen: list[Tensor] = []
    monkeypatch.setattr(method, "lesson", lambda lesson=method.lesson: seen.extend(lesson()) or seen)
    method.imitate()
    x = torch.cat(seen)
    assert len(x) == 16
    assert found[2] == pytest.approx(float(kl_by_hand(method.student(x), method.teacher(x), 3.0)), rel=1e-9)


def test_each_step_leaves_gradients_and_buffers_of_others_alone(float32):
    method = game(float32)
    fake = method.generator(method.sample_noise())
    student, generator = all_state(method.student), all_state(method.generator)
    method.discriminate(fake.detach())
    assert all(p.grad is None for p in (*method.generator.parameters(), *method.student.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(student, all_state(method.student), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(generator, all_state(method.generator), strict=True))
    grads = [p.grad.clone() for p in method.discriminator.parameters()]
    method.generate(fake)
    assert all(torch.equal(p.grad, g) for p, g in zip(method.discriminator.parameters(), grads, strict=True))
    assert all(p.grad is None for p in method.student.parameters())
    assert all(p.grad is not None for p in method.generator.parameters())
    assert all(p.requires_grad for p in (*method.student.parameters(), *method.discriminator.parameters()))


def test_the_generator_learns_through_every_other_player(float32):
    gradients = {}
    for term in ("loc", "align", "adv", "balance"):
        weights = dict.fromkeys(("loc", "align", "adv", "balance"), 0.0) | {term: 1.0}
        method = game(float32, replace(SMALL, **weights))
        method.generator_optimizer.step = lambda *a, **k: None
        method.generate(method.generator(method.sample_noise()))
        gradients[term] = torch.cat([p.grad.flatten() for p in method.generator.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize("in_train_mode", [True, False])
def test_the_student_s_running_statistics_move_in_train_mode_only(float32, in_train_mode):
    method = game(float32, replace(SMALL, student_trains_in_generation=in_train_mode))
    before = method.student[1].running_mean.clone()
    method.generate(method.generator(method.sample_noise()))
    assert torch.equal(before, method.student[1].running_mean) is not in_train_mode
    assert method.student.training


def test_nothing_of_the_teacher_ever_changes(float32):
    method = game(float32)
    before = all_state(method.teacher)
    for _ in range(4):
        method.step()
    assert all(torch.equal(a, b) for a, b in zip(before, all_state(method.teacher), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not any(m.training for m in method.teacher.modules())


def test_the_student_sees_both_kinds_in_one_batch(float32, monkeypatch):
    method = game(float32)
    sizes = []
    monkeypatch.setattr(method, "look", lambda x, look=method.look: sizes.append(len(x)) or look(x))
    running = method.generator[2].running_mean.clone()
    method.imitate()
    assert sizes == [16] and not torch.equal(running, method.generator[2].running_mean)


def test_without_weight_the_discriminator_stays_and_the_rest_is_the_game_without_it(float32):
    with_d, without = game(float32, replace(SMALL, loc=0.0)), game(float32, replace(SMALL, loc=0.0))
    without.discriminator = None
    before = parameters(with_d.discriminator)
    for _ in range(3):
        a, b = with_d.step(), without.step()
        assert {k: float(v) for k, v in a.items()} == {k: float(v) for k, v in b.items()}
    assert not moved(with_d.discriminator, before)
    assert all(p.grad is None for p in with_d.discriminator.parameters())


def test_the_data_free_game_may_read_no_images(float32):
    teacher, student, generator, _ = players()
    images = at_hand()
    free = DataFreeGame(teacher, student, generator, SMALL, float32)
    fit(free, 1, name="free", progress=False)
    with pytest.raises(DataFreeViolation):
        fit(free, 1, name="free", progress=False, evaluate=lambda: {"n": float(len(images.images))})


def test_distillation_alone_lowers_its_loss(float32):
    method = MosaicKD(*players()[:2], None, None, at_hand(), replace(SMALL, n_steps=0, temperature=4.0), float32)
    found = [float(method.step()["distillation loss"]) for _ in range(10)]
    assert found[-1] < found[0]
    with pytest.raises(InputError, match="no generator"):
        method.pictures(2)


def test_seeds_decide_the_losses():
    def found(seed: int) -> list[float]:
        method = game(Runtime.choose("cpu", "float32", seed=seed))
        return [float(method.step()["local"]) for _ in range(3)]

    assert found(0) == found(0) != found(1)


def test_watching_changes_nothing(float32):
    one, other = game(float32), game(float32)
    assert set(one.watch(4)) == {"images", "teacher", "student"} and len(one.pictures(20)) == 20
    assert float(one.step()["distillation loss"]) == float(other.step()["distillation loss"])


def test_the_teacher_alone_makes_a_generator_surer_and_more_even(float32):
    method = game(float32, replace(SMALL, batch_size=64, loc=0.0, adv=0.0, n_steps=0, lr_generator=3e-3))
    first = method.generate(method.generator(method.sample_noise()))
    for _ in range(30):
        last = method.generate(method.generator(method.sample_noise()))
    assert last["align"] + 10 * last["balance"] < first["align"] + 10 * first["balance"]


def test_a_discriminator_learns_to_tell_patches_apart(float32):
    method = game(float32, replace(SMALL, batch_size=16, n_steps=0, lr_discriminator=1e-2))
    fake = method.generator(method.sample_noise()).detach()
    for _ in range(50):
        method.discriminate(fake)
        method.steps += 1
    with torch.no_grad():
        real, _ = method.images.batch(range(16))
        right = (method.discriminator(real) > 0).float().mean() + (method.discriminator(fake) < 0).float().mean()
    assert right / 2 > 0.8


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"reduction": "max"}, "mean, sum"), ({"kd_steps": 0}, "kd_steps"), ({"batch_size": 1}, "batch_size"),
     ({"loc": -1.0}, "loc"), ({"temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_players_that_cannot_play_together_are_refused(float32):
    teacher, student, generator, discriminator = players()
    for made, judge, images in ((None, None, None), (generator, discriminator, None), (None, discriminator, at_hand())):
        with pytest.raises(InputError):
            MosaicKD(teacher, student, made, judge, images, SMALL, float32)
    with pytest.raises(InputError, match="same network"):
        MosaicKD(teacher, teacher, generator, None, None, SMALL, float32)


# --- images at hand ---


def test_the_least_certain_images_are_kept():
    entropy = torch.tensor([0.1, 2.0, float("nan"), 1.0, 2.0])
    assert out_of_domain.most_uncertain(entropy, 3).tolist() == [1, 3, 4]
    assert out_of_domain.most_uncertain(entropy, 1).tolist() == [1]
    assert out_of_domain.most_uncertain(entropy, 9).tolist() == [0, 1, 2, 3, 4]
    assert out_of_domain.most_uncertain(entropy, 4).tolist() == [0, 1, 3, 4]
    random = torch.rand(50)
    kept = out_of_domain.most_uncertain(random, 20)
    left = torch.ones(50, dtype=torch.bool).index_fill(0, kept, False)
    assert random[kept].min() >= random[left].max()
    assert out_of_domain.most_uncertain(random[kept], 20).tolist() == list(range(20))


def test_a_certain_image_is_never_taken_for_an_unsure_one(float32):
    logits = torch.zeros(3, 4)
    logits[1, 0] = 200.0
    assert out_of_domain.most_uncertain(mosaickd.entropies(logits), 2).tolist() == [0, 2]
    assert mosaickd.entropies(logits.half()).isfinite().all()
    assert out_of_domain.teacher_entropies(players()[0].eval(), at_hand(), float32).shape == (30,)


def test_collages_are_tiled_from_whole_images():
    images = at_hand(5)
    found = out_of_domain.collages(images, (16, 24), 3)
    assert found.image_shape == (1, 16, 24) and len(found) == 3 and found.split == "train"
    tile = found.images[1, :, 8:16, 16:24]
    assert any(torch.equal(tile, image) for image in images.images)
    with pytest.raises(InputError, match="do not tile"):
        out_of_domain.collages(images, (12, 24), 3)


def test_a_mosaic_of_its_own_patches_is_the_image():
    x = torch.rand(3, 2, 8, 8)
    laid, distance = out_of_domain.mosaic(x, x.roll((3, 2), (2, 3)), 2)
    assert (laid - x).abs().mean() < 0.2 and distance.shape == (3, 16)
    laid, distance = out_of_domain.mosaic(x, torch.cat([torch.zeros_like(x), x]), 4, stride=2)
    assert torch.equal(laid, x) and distance.max() < 1e-3


def test_on_digits_the_game_beats_distillation_on_a_foreign_digit():
    """Averaged over two seeds; the margin is far below what was seen."""
    classes = [0, 2, 3, 5, 6, 8, 9]
    train, test = (data.load("digits", split).of_classes(classes) for split in ("train", "test"))
    about = data.info("digits")
    recipe = replace(RECIPES["digits"], epochs=8)
    teacher = train_or_load("digits_cnn", train, test, recipe, Runtime.choose("cpu", "float32")).module
    ones = data.load("digits", "train").of_classes([1])
    settings = Settings(
        latent_dim=32, batch_size=32, n_steps=60, pad=0, flip=False, lr_generator=3e-3, lr_discriminator=3e-3
    )

    def reached(plays: bool, seed: int) -> float:
        runtime = Runtime.choose("cpu", "float32", seed=seed)
        shape, pixels = (1, 8, 8), {"mean": about.mean, "std": about.std}
        student = models.build("digits_cnn_half", n_classes=7, in_channels=1, **pixels)
        made = models.build_generator("toolbox_large", latent_dim=32, image_shape=shape, ngf=8, **pixels)
        judge = models.build_discriminator("patch5", image_shape=shape, ndf=16, **pixels)
        extra = (made, judge) if plays else (None, None)
        fit(MosaicKD(teacher, student, *extra, ones, settings, runtime), 60, name="digits", progress=False)
        return accuracy(student, test, runtime)

    with_game, without = (sum(reached(plays, seed) for seed in (0, 1)) / 2 for plays in (True, False))
    assert with_game > without + 0.1
