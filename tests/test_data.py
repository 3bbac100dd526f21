"""The data layer: what is loaded, from where, in which form, and what a data-free method may not touch."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_lib import data
from dfkd_lib.data import guard, sources
from dfkd_lib.errors import DamagedFile, DataFreeViolation, DataUnavailable, InputError

SHAPES = {"mnist": (28, 28), "cifar10": (32, 32, 3), "camvid": (360, 480, 3)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    return tmp_path


def store(root: Path, name: str, split: str, n: int, **changed) -> Path:
    """Write a random split as the cache keeps it; `changed` replaces arrays."""
    facts, random = data.info(name), np.random.RandomState(len(split))
    arrays = {
        "images": random.randint(256, size=(n, *SHAPES[name])).astype(np.uint8),
        "classes": np.array([f"class {i}" for i in range(facts.n_classes)]),
    }
    if facts.task == "segmentation":
        arrays["masks"] = random.randint(facts.n_classes + 1, size=(n, *SHAPES[name][:2])).astype(np.uint8)
    else:
        arrays["labels"] = np.arange(n, dtype=np.int64) % facts.n_classes
    path = root / name / f"{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{**arrays, **changed})
    return path


def one_line(error: pytest.ExceptionInfo, *parts: str) -> bool:
    text = str(error.value)
    return "\n" not in text and all(part in text for part in parts)


# --- embedded sets ---


def test_digits_are_split_by_class_and_the_same_every_time():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.image_shape == data.info("digits").image_shape and len(train) + len(test) == 1797
    per_class = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert (per_class - 0.2).abs().max() < 0.01
    assert train.fingerprint == data.load("digits", "train").fingerprint != test.fingerprint


@pytest.mark.parametrize("name", ["digits", "digit_scenes", "photo_patches"])
def test_published_statistics_are_those_of_the_training_images(name):
    x, facts = data.load(name, "train").images / 255, data.info(name)
    assert facts.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert facts.std == pytest.approx(x.std((0, 2, 3)).tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["digits", "digit_scenes", "mnist"])
def test_fit_and_held_out_cut_train_in_two(name, root):
    store(root, "mnist", "train", 300)
    parts = [data.load(name, split) for split in ("fit", "held_out")]
    train = data.load(name, "train")
    assert len(parts[1]) / len(train) == pytest.approx(0.1, abs=0.005)

    def rows(images):
        return sorted(bytes(image.numpy()) for image in images)

    assert rows(torch.cat([part.images for part in parts])) == rows(train.images)
    if train.task == "classification":
        assert set(parts[1].labels.tolist()) == set(range(10))


def test_scenes_show_digits_of_their_own_split_in_labelled_squares():
    for split, n in (("train", 1000), ("test", 200)):
        scenes, digits = data.load("digit_scenes", split), data.load("digits", split, image_size=10)
        assert len(scenes) == n and scenes.classes[0] == "background" and scenes.task == "segmentation"
        assert not scenes.images[:, 0][scenes.labels == 0].any()
        known = {(bytes(d.numpy()), int(c)) for d, c in zip(digits.images, digits.labels, strict=True)}
        for cell in range(9):
            top, left = 11 * (cell // 3), 11 * (cell % 3)
            for image, mask in zip(scenes.images[:50, 0], scenes.labels[:50], strict=True):
                tile, label = image[top : top + 10, left : left + 10], mask[top, left]
                assert label == 0 or (bytes(tile.contiguous().numpy()), int(label) - 1) in known
        filled = (scenes.labels[:, ::11, ::11] > 0).float().mean()
        assert filled == pytest.approx(2 / 3, abs=0.05)
    assert scenes.fingerprint == data.load("digit_scenes", "test").fingerprint


# --- stored files ---


def test_a_stored_set_is_handed_out_as_floats_in_unit_range(root):
    stored = np.load(store(root, "cifar10", "test", 20))
    found = data.load("cifar10", "test")
    x, y = found.batch([3, 1])
    assert x.dtype == torch.float32 and y.tolist() == [3, 1]
    assert np.array_equal((x * 255).permute(0, 2, 3, 1).round().byte(), stored["images"][[3, 1]])
    assert found.classes == tuple(stored["classes"]) and found.n_classes == 10


def test_batches_cover_the_set_in_order(root):
    store(root, "camvid", "test", 5)
    found = data.load("camvid", "test", image_size=(12, 16))
    parts = list(found.batches(2))
    x, y = found.batch(torch.arange(5))
    assert [len(part) for part, _ in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert torch.equal(torch.cat([part for _, part in parts]), y)
    assert y.dtype == torch.int64 and y.shape == (5, 12, 16)


def test_masks_keep_their_values_when_resized(root):
    masks = np.full((2, 360, 480), 11, np.uint8)
    masks[0, :180] = 3
    images = np.repeat(masks[..., None] * 20, 3, axis=3)
    store(root, "camvid", "test", 2, masks=masks, images=images)
    found = data.load("camvid", "test", image_size=(96, 128))
    assert found.void == 11 and found.n_classes == 11 and found.image_shape == (3, 96, 128)
    assert (found.labels[0, :48] == 3).all() and (found.labels[0, 48:] == 11).all()
    away = torch.arange(96).sub(47.5).abs() > 1
    assert torch.equal(found.images[:, 0][:, away], found.labels[:, away] * 20)


def test_camvid_holds_out_its_published_validation_split(root):
    for split, n in (("train", 3), ("val", 2)):
        store(root, "camvid", split, n)
    assert [len(data.load("camvid", s, image_size=8)) for s in ("train", "fit", "held_out")] == [3, 3, 2]


def test_images_change_size_and_channels(root):
    store(root, "mnist", "test", 4, images=np.full((4, 28, 28), 77, np.uint8))
    stored = np.load(store(root, "cifar10", "test", 4))["images"]
    grey = data.load("mnist", "test", image_size=32, channels=3)
    assert grey.image_shape == (3, 32, 32) and (grey.images == 77).all()
    luma = data.load("cifar10", "test", channels=1)
    expected = [np.asarray(Image.fromarray(image).convert("L")) for image in stored]
    assert np.array_equal(luma.images[:, 0].numpy(), expected)


def test_a_smaller_set_knows_its_own_contents(root):
    store(root, "mnist", "test", 30)
    found = data.load("mnist", "test")
    assert torch.equal(found.take(3).images, found.images[:3])
    assert found.take([5, 2]).labels.tolist() == [5, 2]
    assert found.take(30).fingerprint == found.fingerprint == found.to("cpu").fingerprint
    others = [found.take(29), found.take(range(29, -1, -1))]
    assert len({found.fingerprint, *(other.fingerprint for other in others)}) == 3
    with pytest.raises(InputError, match="at most 30"):
        found.take(31)
    for beyond in ([5, 30], range(25, 31), [-1]):
        with pytest.raises(InputError, match=r"cannot take image .* it has 30"):
            found.take(beyond)


def test_an_image_set_refuses_tensors_that_do_not_fit():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="uint8"):
        data.ImageSet(images.float(), name="mine", split="test")
    for labels in (torch.zeros(3).long(), torch.zeros(2), torch.zeros(2, 4, 5).byte()):
        with pytest.raises(InputError, match="mine: labels"):
            data.ImageSet(images, labels, name="mine", split="test")


@pytest.mark.parametrize(
    ("name", "split", "options", "says"),
    [
        ("minst", "test", {}, "did you mean 'mnist'"),
        ("mnist", "tests", {}, "did you mean 'test'"),
        ("mnist", "test", {"channels": 2}, "channels must be"),
        ("mnist", "test", {"image_size": 0}, "image_size must be"),
        ("folder:.", "test", {}, "give image_size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, split, options, says):
    with pytest.raises(InputError, match=says):
        data.load(name, split, **options)


@pytest.mark.parametrize(
    "changed",
    [
        {"images": np.zeros((4, 28, 28))},
        {"images": np.zeros((4, 28, 28, 3), np.uint8)},
        {"labels": np.zeros(3, np.int64)},
        {"labels": np.array([0, 1, 2, 10])},
        {"labels": np.array([0, 1, 2, -1])},
        {"labels": np.array([0, 1, 2, None], dtype=object)},
        {"classes": np.array(["only one"])},
    ],
)
def test_a_file_with_wrong_contents_is_named(root, changed):
    path = store(root, "mnist", "test", 4, **changed)
    with pytest.raises(DamagedFile) as error:
        data.load("mnist", "test")
    assert one_line(error, str(path), "delete it", "dfkd data mnist")


@pytest.mark.parametrize("kept", [0, 100, 2000])
def test_a_file_cut_short_is_named(root, kept):
    path = store(root, "mnist", "test", 4)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedFile, match="is damaged"):
        data.load("mnist", "test")


# --- fetching ---


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_a_cut_network_fails_fast_with_the_remedy(root, monkeypatch, name, listening):
    """Once with a gateway that refuses, once with one that swallows what it is sent."""
    with socket.socket() as gateway:
        gateway.bind(("127.0.0.1", 0))
        if listening:
            gateway.listen()
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{gateway.getsockname()[1]}")
        for variable in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        start = time.monotonic()
        with pytest.raises(DataUnavailable) as error:
            data.load(name, "test")
    assert time.monotonic() - start < 3
    assert one_line(error, name, "test.npz", str(root / name), f"dfkd data {name}", "not reachable")
    assert not any(root.iterdir())


@pytest.fixture
def fake_mnist(monkeypatch):
    """torchvision's MNIST class replaced by one that counts its downloads."""
    from torchvision import datasets

    made = []

    class FakeMNIST:
        def __init__(self, folder, train, download):
            made.append(train)
            Path(folder).mkdir(parents=True)
            time.sleep(0.05)
            self.data = torch.full((20, 28, 28), len(made), dtype=torch.uint8)
            self.targets = torch.arange(20) % 10
            Path(folder).rmdir()

    monkeypatch.setattr(datasets, "MNIST", FakeMNIST)
    monkeypatch.setattr(sources, "unreachable", lambda url: "")
    return made


def test_two_at_once_download_a_set_once(root, fake_mnist, capsys):
    found = []
    threads = [threading.Thread(target=lambda: found.append(data.load("mnist", "train"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(s) for s in found] == [20, 20] and fake_mnist == [True, False]
    assert found[0].classes == tuple("0123456789")
    assert data.prepare("mnist") == [root / "mnist" / "train.npz", root / "mnist" / "test.npz"]
    assert len(fake_mnist) == 2 and capsys.readouterr().out.count("downloading mnist") == 2


def test_a_download_that_breaks_leaves_what_was_there(root, monkeypatch):
    def broken(name, folder, split):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise EOFError("the stream\nended early")

    kept = store(root, "mnist", "train", 10).read_bytes()
    monkeypatch.setattr(sources, "_torchvision", broken)
    monkeypatch.setattr(sources, "unreachable", lambda url: "")
    with pytest.raises(DataUnavailable) as error:
        data.load("mnist", "test")
    assert one_line(error, "mnist", "the stream ended early")
    assert sorted(p.name for p in (root / "mnist").iterdir() if p.name != ".lock") == ["train.npz"]
    assert (root / "mnist" / "train.npz").read_bytes() == kept


def test_embedded_sets_need_no_files(root):
    assert data.prepare("digits") == data.prepare("digit_scenes") == data.prepare("photo_patches") == []


def test_camvid_is_converted_from_its_folders(root):
    with pytest.raises(DataUnavailable) as error:
        data.load("camvid", "test")
    assert one_line(error, "camvid", "trainannot", str(root / "camvid"))
    images, masks = np.full((36, 48, 3), 9, np.uint8), np.eye(36, 48, dtype=np.uint8) * 11
    for split in ("train", "val", "test"):
        for folder, array in ((split, images), (f"{split}annot", masks)):
            (root / "camvid" / folder).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(array).save(root / "camvid" / folder / f"{i}.png")
    found = data.load("camvid", "test")
    assert (found.images == 9).all() and np.array_equal(found.labels[1], masks)
    assert found.classes[0] == "sky" and len(data.load("camvid", "held_out")) == 2
    (root / "camvid" / "test.npz").unlink()
    (root / "camvid" / "testannot" / "1.png").unlink()
    with pytest.raises(DataUnavailable, match="the test images"):
        data.load("camvid", "test")


# --- a folder of one's own ---


@pytest.fixture
def pictures(tmp_path):
    for name, level, count in (("cat", 10, 2), ("ant", 200, 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((20 + i, 30, 3), level, np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "cut.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes()[:60])
    (tmp_path / "cat" / ".hidden").write_text("not looked at")
    return tmp_path


def test_sub_folders_become_classes(pictures):
    with pytest.warns(UserWarning, match="2 of 7 files"):
        found = data.load(f"folder:{pictures}", "fit", image_size=(8, 6))
    assert found.classes == ("ant", "cat") and found.image_shape == (3, 8, 6)
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.images.amax((1, 2, 3)).tolist() == [200, 10, 200, 10, 200]


def test_a_flat_folder_has_no_labels(pictures):
    deep = np.full((9, 9), 65535, np.uint16)
    Image.fromarray(deep).save(pictures / "ant" / "sixteen-bit.png")
    found = data.load(f"folder:{pictures / 'ant'}", "test", image_size=4, channels=1)
    assert found.labels is None and found.n_classes == 0 and found.image_shape == (1, 4, 4)
    assert sorted(found.images.amax((1, 2, 3)).tolist()) == [200, 200, 200, 255]
    assert found.batch([0])[1].tolist() == [-1]


def test_a_folder_without_images_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="folder"):
            data.load(f"folder:{path}", "train", image_size=8)


# --- the guard ---


def test_a_data_free_method_reads_nothing_but_test_images(pictures):
    train, test = data.load("digits", "train"), data.load("digits", "test")
    reads = [
        lambda: data.load("digits", "train"),
        lambda: data.load("digit_scenes", "held_out"),
        lambda: data.load(f"folder:{pictures}", "test", image_size=8),
        lambda: train.batch([0]),
        lambda: next(train.batches(2)),
        lambda: train.take(2).to("cpu").images,
        lambda: train.labels,
    ]
    with data.no_training_data("DFAD"):
        for read in reads:
            with pytest.raises(DataFreeViolation, match=r"^DFAD "):
                read()
        made = data.ImageSet(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), name="bank", split="synthetic")
        assert len(made.batch([0, 2])[0]) == 2
        assert len(test.batch([0, 1])[0]) == 2 and len(data.load("digits", "test").images) == len(test)
        assert len(train) == 1442 and train.n_classes == 10
    assert len(train.batch([0])[0]) == 1


def test_guards_nest_and_end_with_their_block():
    train = data.load("digits", "train")
    with data.no_training_data("outer"):
        with pytest.raises(RuntimeError, match="inside"), data.no_training_data("inner"):
            with pytest.raises(DataFreeViolation, match=r"^inner "):
                train.batch([0])
            raise RuntimeError("inside")
        with pytest.raises(DataFreeViolation, match=r"^outer "):
            train.batch([0])
    train.batch([0])


def test_guards_may_close_in_any_order():
    first, second = data.no_training_data("same"), data.no_training_data("same")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(DataFreeViolation):
        guard.check("digits", "train")
    second.__exit__(None, None, None)
    guard.check("digits", "train")


def test_a_guard_holds_in_other_threads():
    train, raised = data.load("digits", "train"), []

    def read():
        try:
            train.batch([0])
        except DataFreeViolation as e:
            raised.append(e)

    with data.no_training_data("DFAD"):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert len(raised) == 1


def test_the_audit_lists_what_was_opened(root):
    store(root, "mnist", "test", 7)
    found = data.load("mnist", "test", image_size=9)
    assert data.opened().count(("mnist", "test", found.fingerprint)) == 1
    data.load("mnist", "test", image_size=9)
    assert data.opened().count(("mnist", "test", found.fingerprint)) == 1


def test_importing_the_data_layer_is_light():
    code = "import sys, dfkd_lib.data; print({'torchvision', 'sklearn', 'pandas', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
