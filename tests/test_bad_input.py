"""What people and disks get wrong: one line that names the thing, the right exit status, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny_book import refused

from dfkd_lib import files, locations
from dfkd_lib.errors import DamagedFile, DFKDError, InputError
from dfkd_lib.reproduction import plans, runs
from dfkd_lib.reproduction.cli import main
from dfkd_lib.reproduction.yaml_files import read_yaml

ASKED = {"chapter": "tiny", "profile": "smoke", "parameters": {"profile": "smoke"}, "command": "dfkd run tiny"}
RECORD = {
    "schema": 1, "chapter": "tiny", "profile": "cpu", "parameters": {}, "seed": 0, "metrics": {}, "best": {},
    "seconds": 1.0, "finished": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
posix = pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")

pytestmark = pytest.mark.usefixtures("here")


@posix
@pytest.mark.parametrize(
    "folder", ["file", "file/below", "/proc/x", "/dev/null/x", "~nosuchuser/x", "x" * 300, "/x" * 3000, ""]
)
def test_a_folder_that_cannot_be_written_to(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    Path("file").write_text("mine")
    Path("plan.yml").write_text("chapters: [tiny]\n")
    for words in (["run", "tiny"], ["run", "tiny", "--plain"], ["batch", "plan.yml"]):
        said = refused(capsys, *words, "--out", folder)
        assert "cannot be used" in said or "cannot write into folder" in said
    assert Path("file").read_text() == "mine" and not Path("runs").exists()


@pytest.mark.parametrize(
    "words", [["run", "tiny", "-f"], ["batch"], ["results", "--runs"], ["run", "tiny", "--resume"]]
)
@pytest.mark.parametrize("name", ["x" * 5000, "", "~nosuchuser/x"])
def test_a_name_that_no_file_can_have(capsys: pytest.CaptureFixture[str], words: list[str], name: str) -> None:
    refused(capsys, *words, name)


def test_places_of_users_that_are_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("DFKD_CACHE", "~nosuchuser/cache")
    assert "DFKD_CACHE is ~nosuchuser/cache" in refused(capsys, "doctor")
    for name in ("DFKD_CACHE", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="set DFKD_CACHE"):
        locations.cache_root()


def test_a_read_only_place_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: FileLock, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", closed)
    with files.lock(tmp_path / "cache" / ".lock"):
        pass  # nothing can be written there, so there is nothing to guard

    def full(self: FileLock, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileLock, "acquire", full)
    with pytest.raises(DFKDError, match="No space left"), files.lock(tmp_path / ".lock"):
        pass


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["run", "tiny", "--plain", "--json"]])
def test_output_into_a_full_device(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dfkd_lib", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr.endswith("dfkd: error: No space left on device\n")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@posix
@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_a_reader_that_leaves_ends_the_run_quietly(here: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "dfkd_lib", "run", "tiny", "-p", "mode", "wait", "--out", "a", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert "start" in process.stdout.readline()
        process.stdout.close()  # as head -1 does
        with open(here / "a" / "events.jsonl", "a") as events:
            events.write(json.dumps({"event": "progress", "fit": "toy", "step": 2, "n_steps": 3}) + "\n")
        assert process.stderr.read() == ""
    assert process.returncode == 1 and not (here / "a" / "record.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("out: x", "set out with --out, not in f.yml"),
        ("profile: ../../x", "set profile with --profile, not in f.yml"),
        ("lr: 0.1\nlr: 0.2", "key 'lr' is there twice"),
        ("sizes: &a [*a]", "contains itself"),
        ("1: 2", "must hold lines"),
        ("lr: .nan", "must be finite"),
        ("lr: !!python/object:os.system x", "is not YAML"),
        ("anything: 2020-01-01", "must be made of numbers, text and lists"),
        ("[" * 5000, "f.yml"),
        ("\0", "is not YAML"),
    ],
)
def test_parameter_files(capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    Path("f.yml").write_text(text)
    assert words in refused(capsys, "run", "tiny", "-f", "f.yml")


@pytest.mark.parametrize("value", ["[" * 3000, "9" * 5000, "{1}", "(1,", "", "&a [*a]"])
def test_values_that_are_none(capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert "parameter sizes" in refused(capsys, "run", "tiny", "-p", "sizes", value)
    assert "parameter lr" in refused(capsys, "run", "tiny", "-p", "lr", value)


def test_aliases_that_explode_and_files_that_are_far_too_large(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    Path("f.yml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="stands for more than"):
        read_yaml(Path("f.yml"))
    Path("f.yml").write_text("a: " + "1" * 2_000_000)
    with pytest.raises(InputError, match="letters"):
        read_yaml(Path("f.yml"))
    Path("f.yml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(Path("f.yml")) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chapters: [[tiny]]", "must be a list of names"),
        ("chapters: [tiny]\nprofiles: [{a: 1}]", "must be a list of names"),
        ("chapters: [tiny]\ngrid: {1: [2]}", "must hold lines"),
        ("chapters: [tiny]\ngrid: {lr: [{1: 2}]}", "must map names to values"),
        ("chapters: [tiny]\ngrid: []", "must hold lines"),
        ("chapters: [tiny]\ninclude: [1]", "must be a list of"),
        ("grids: []", "at least one"),
        ("chapters: [tiny]\nchapters: [tiny]", "there twice"),
        ("chapters: [tiny]\ngpus: true", "gpus must be"),
    ],
)
def test_plans(capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    Path("plan.yml").write_text(text)
    assert words in refused(capsys, "batch", "plan.yml", "--dry-run")


def test_a_million_points_are_counted_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, rates = list(range(1, 101)), [i / 10 for i in range(1, 11)]
    plan = f"chapters: [tiny]\nseeds: {list(range(1000))}\ngrid: {{n_steps: {steps}, lr: {rates}}}"
    Path("plan.yml").write_text(plan)
    monkeypatch.setattr(plans, "Point", None)
    with pytest.raises(InputError, match="1,000,000 points"):
        plans.read(Path("plan.yml"))


def test_a_chapter_is_read_once_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path, *of: Any, **options: Any) -> Any:
        read.append(path)
        return files.read_json(path, *of, **options)

    monkeypatch.setattr("dfkd_lib.reproduction.parameters.read_json", counted)
    Path("plan.yml").write_text(f"chapters: [tiny]\nseeds: {list(range(300))}")
    assert len(plans.read(Path("plan.yml")).points) == 300
    assert len(read) == 1


@pytest.mark.parametrize("key", ASKED)
@pytest.mark.parametrize("value", [None, 1, [], {"a": 1}])
def test_a_damaged_run_file_is_named(capsys: pytest.CaptureFixture[str], key: str, value: Any) -> None:
    if key == "parameters" and isinstance(value, dict):
        value = "x"
    files.write_json(Path("a/run.json"), ASKED | {key: value})
    assert "run.json is damaged" in refused(capsys, "run", "tiny", "--resume", "a", status=1)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"profile": "smoke", "out": "x"}, "set out with --out"),
        ({"profile": "../../x"}, "unknown profile"),
        ({}, "unknown profile"),
        ({"profile": "smoke", "lr": "x"}, "parameter lr"),
        ({"profile": "smoke", "lrr": 1}, "did you mean 'lr'?"),
    ],
)
def test_a_run_file_obeys_the_rules(capsys: pytest.CaptureFixture[str], parameters: Any, words: str) -> None:
    files.write_json(Path("a/run.json"), ASKED | {"parameters": parameters})
    assert words in refused(capsys, "run", "tiny", "--resume", "a")


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key in RECORD for value in (None, [1])),
        *({key: {"a/b/c": "x"}} for key in ("metrics", "best")),
        {"metrics": {"accuracy": 0.5}},
        {"data": [{"name": 1, "split": "test"}]},
        {"packages": [1]},
        {"seed": True},
        {"schema": 2},
    ],
    ids=json.dumps,
)
def test_a_damaged_record_is_named(capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    files.write_json(Path("mine/a/record.json"), RECORD | change)
    assert str(Path("mine/a/record.json")) in refused(capsys, "results", "--runs", "mine", status=1)


@pytest.mark.parametrize("text", ["", "[", "NaN", "\ufeff{}", "[" * 100_000, "{} {}"])
def test_what_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DamagedFile, match=r"f\.json"):
        files.read_json(tmp_path / "f.json")
    with pytest.raises(DamagedFile, match="cannot read"):
        files.read_json(tmp_path)


def test_files_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.yml").write_text("chapters: [tiny]\n")
    (point,) = plans.read(Path("plan.yml")).points
    folder = Path("runs/plan") / point.name
    files.write_json(folder / "record.json", RECORD)
    for text in ("{", "[]", '{"seconds": "x"}'):
        (folder / "batch.json").write_text(text)
        assert "batch.json" in refused(capsys, "batch", "plan.yml", "--dry-run", status=1)
    for text in ("{", "[]", '{"error": 1}'):
        (folder / "failed.json").write_text(text)
        assert "failed.json" in refused(capsys, "batch", "plan.yml", status=1)


def test_an_address_where_nobody_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    from dfkd_lib.reproduction import cluster

    assert 2 * cluster.PATIENCE < 15, "seconds, to reach it and to be answered"
    Path("plan.yml").write_text("chapters: [tiny]\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cluster.PATIENCE, patience = 0.3, cluster.PATIENCE
        try:
            for address in (f"tcp://127.0.0.1:{silent.getsockname()[1]}", "nonsense", "ftp://a:1", "tcp://"):
                assert "no Dask scheduler answers" in refused(capsys, "batch", "plan.yml", "--scheduler", address)
        finally:
            cluster.PATIENCE = patience
    assert "address of the scheduler is empty" in refused(capsys, "batch", "plan.yml", "--scheduler", "")


def test_lines_among_the_events_that_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = here / "events.jsonl"
    with runs.Follow(events):
        lines = [
            "x",
            "[]",
            "{}",
            '{"event": "done", "fit": 1}',
            '{"event": "done", "fit": "a", "step": 1, "n_steps": 1}',
        ]
        events.write_text("\n".join(lines) + "\n")
    assert capsys.readouterr().err == "a: done after 1 steps, 0:00, \n"


def test_a_fault_of_our_own_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def faulty() -> list[str]:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("dfkd_lib.reproduction.cli_show.chapters", faulty)
    assert main(["list"]) == 1
    assert "ZeroDivisionError: division by zero (a fault of this program" in capsys.readouterr().err
    assert main(["list", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


@posix
def test_closed_and_narrow_streams(here: Path) -> None:
    command = f"{sys.executable} -m dfkd_lib list"
    assert subprocess.run(f"{command} >&- 2>&-", shell=True).returncode == 0
    page = here / "book" / "chapters" / "tiny.ipynb"
    page.write_text(page.read_text().replace("A tiny chapter", "Déjà vu"), encoding="utf-8")
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, shell=True, env=narrow, capture_output=True, text=True)
    assert done.returncode == 0 and "D?j? vu" in done.stdout
