"""The `dfkd` command: exit status, one-line errors, run folders, JSON lines, kill and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_book import refused

from dfkd_lib.reproduction.cli import main, parser

pytestmark = pytest.mark.usefixtures("here")


def dfkd(command: str) -> int:
    """Run a command in this process; returns its exit status."""
    return main(command.split())


@contextmanager
def waiting_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A `dfkd run` in another process, in the middle of its work."""
    command = [sys.executable, "-m", "dfkd_lib", "run", "tiny", "-p", "mode", "wait", "--out", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 180
            while not (folder / "done.txt").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def test_list_shows_chapters_profiles_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("list") == 0
    assert capsys.readouterr().out == "tiny: A tiny chapter\n  smoke  a second\n  cpu    two seconds\n"
    assert dfkd("list tiny") == 0
    assert "lr = 0.5 (float)  (0..1] learning rate\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run tinny", "unknown chapter 'tinny'; did you mean 'tiny'?"),
        ("list tinny", "did you mean 'tiny'?"),
        ("results tinny", "did you mean 'tiny'?"),
        ("refresh tinny", "did you mean 'tiny'?"),
        ("data mnits", "did you mean 'mnist'?"),
        ("run tiny --profile cqu", "did you mean 'cpu'?"),
        ("run tiny -p n_stepz 3", "did you mean 'n_steps'?"),
        ("run tiny -p n_steps three", "must be of type int"),
        ("run tiny -p n_steps 2.5", "must be of type int"),
        ("run tiny -p n_steps 0", "must be in [1..100]"),
        ("run tiny --seed -1", "must be in [0..]"),
        ("run tiny -p mode dance", "must be in {work|"),
        ("run tiny -p device cuda:99", "not present on this machine"),
        ("run tiny -p device abacus", "unknown device"),
        ("run tiny -p profile cpu", "set profile with --profile"),
        ("run tiny -p out x", "set out with --out"),
        ("run tiny -f none.yml", "cannot read none.yml"),
        ("run tiny --resume nowhere", "no run to resume"),
        ("run tiny --resume a --out b", "not allowed with"),
        ("run", "CHAPTER"),
        ("rum", "invalid choice"),
        ("results --runs nowhere", "no folder nowhere"),
        ("book --workers 0", "workers must be 1 or more"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], command: str, words: str) -> None:
    assert words in refused(capsys, *command.split())
    assert not Path("runs").exists(), "nothing may be left behind by a refused run"


def test_a_run_from_start_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yml").write_text("lr: 0.125\nn_steps: 4\n")
    assert dfkd("run tiny --profile cpu --seed 3 -f mine.yml -p n_steps 2") == 0
    out, err = capsys.readouterr()
    folder = Path("runs/tiny-cpu-seed3")
    assert "toy/DFAD/accuracy  0.125" in out and str(folder) in out
    assert err == "toy: done after 2 steps, 0:00, accuracy 0.125\n"
    asked = json.loads((folder / "run.json").read_text())
    assert asked["parameters"] == {"lr": 0.125, "n_steps": 2, "profile": "cpu", "seed": 3}
    assert asked["command"] == "dfkd run tiny --profile cpu --seed 3 -f mine.yml -p n_steps 2"

    record = (folder / "record.json").read_bytes()
    assert "finished run" in refused(capsys, *["run", "tiny", "--profile", "cpu", "--seed", "3"])
    assert dfkd(f"run tiny --resume {folder}") == 0
    out, err = capsys.readouterr()
    assert "is finished" in err and "toy/DFAD/accuracy  0.125" in out
    assert (folder / "record.json").read_bytes() == record

    assert dfkd("results") == 0
    out, _ = capsys.readouterr()
    assert "Chapter tiny, toy: accuracy in percent (2 iterations, 1 seed)" in out and "12.5" in out
    assert dfkd("results tiny --csv") == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header == "chapter,run,profile,seed,metric,final,best"
    assert first == "tiny,tiny-cpu-seed3,cpu,3,toy/DFAD/accuracy,0.125,0.125"


def test_json_lines_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("run tiny --json --out a") == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["start", "progress", "progress", "progress", "done", "finished"]
    assert events[-1]["out"] == str(Path("a").resolve())
    assert events[-1]["metrics"] == {"toy/DFAD/accuracy": 0.5, "toy/resumed/value": 0}
    assert err == ""


def test_a_failing_chapter_is_status_1_and_can_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("run tiny --json --out a -p mode fail") == 1
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert last["event"] == "failed" and "ValueError: the toy broke (see" in last["error"]
    assert err == f"dfkd: error: {last['error']}\n"
    assert Path("a/notebook.partial.ipynb").exists() and not Path("a/notebook.ipynb").exists()
    assert "--resume" in refused(capsys, *["run", "tiny", "--out", "a"])
    assert "begun with mode = 'fail'" in refused(capsys, *["run", "tiny", "--resume", "a", "-p", "mode", "work"])
    assert "begun with profile = 'smoke'" in refused(capsys, *["run", "tiny", "--resume", "a", "--profile", "cpu"])


def test_input_that_only_the_chapter_can_refuse_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("run tiny --out a -p mode refuse") == 2
    assert "no such dataset" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").mkdir()
    Path("a/thesis.txt").write_text("mine")
    assert "not empty" in refused(capsys, *["run", "tiny", "--out", "a"])
    assert [path.name for path in Path("a").iterdir() if not path.name.startswith(".")] == ["thesis.txt"]


def test_a_damaged_run_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").mkdir()
    Path("a/run.json").write_text('{"chapter": "ti')
    assert "run.json is not valid JSON" in refused(capsys, *["run", "tiny", "--resume", "a"], status=1)
    Path("a/run.json").write_text("{}")
    assert "run.json is damaged: it lacks 'chapter'" in refused(capsys, *["run", "tiny", "--resume", "a"], status=1)


def test_a_killed_run_resumes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with waiting_run(here / "a") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (here / "a" / "notebook.ipynb").exists() and not (here / "a" / "record.json").exists()
    (here / "a" / "go").touch()
    chapter = here / "book" / "chapters" / "tiny.ipynb"
    chapter.write_text(chapter.read_text() + "\n")
    assert dfkd("run tiny --resume a") == 0
    out, err = capsys.readouterr()
    assert "toy/resumed/value  1" in out and "note: the chapter or the library has changed" in err


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_interrupt_says_how_to_resume_and_a_busy_folder_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting_run(here / "a") as process:
        assert "in use by another process" in refused(capsys, *["run", "tiny", "--resume", "a"], status=1)
        process.send_signal(signal.SIGINT)
        assert process.stderr and process.stderr.read() == (
            f"dfkd: interrupted; continue with: dfkd run tiny --resume {here / 'a'}\n"
        )
        assert process.wait() == 130


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("doctor") == 0
    out = capsys.readouterr().out
    assert "runtime " in out and "digits         embedded" in out
    assert "mnist          not there: dfkd data mnist" in out


def test_an_embedded_dataset_needs_no_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("data digits") == 0
    assert "embedded" in capsys.readouterr().out


def test_every_command_explains_itself_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    commands = list(parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr]
    assert {"run", "batch", "results", "completion"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert f"examples:\n  dfkd {command}" in said and "--quiet" in said and "--verbose" in said


def test_json_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    def read(command: str) -> Any:
        assert dfkd(command) == 0
        return json.loads(capsys.readouterr().out)

    assert read("list --json") == {
        "tiny": {"title": "A tiny chapter", "profiles": {"smoke": "a second", "cpu": "two seconds"}}
    }
    assert read("list tiny --json")["lr"] == {
        "default": 0.5, "type": "float", "range": "(0..1]", "help": "learning rate"
    }  # fmt: skip
    assert read("doctor --json")["datasets"]["digits"] == "embedded"
    assert read("data digits --json") == []
    assert read("results --json") == []


def test_quiet_and_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd("run tiny --quiet --out a") == 0
    assert capsys.readouterr().err == ""
    assert dfkd("run tiny --out b -p mode fail -v") == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("dfkd: error: tiny failed")
    assert "not allowed with" in refused(capsys, *["list", "-q", "-v"])


def test_colours_on_terminals_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in refused(capsys, *["list", "tinny"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert dfkd("list tinny") == 2
    assert capsys.readouterr().err.startswith("\x1b[31mdfkd: error:\x1b[0m unknown chapter")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in refused(capsys, *["list", "tinny"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_chapters_and_profiles(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dfkd(f"completion {shell}") == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("batch", "retry-failed", "tiny", "cpu"))
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)


def test_the_command_starts_without_torch_or_dask() -> None:
    heavy = "{'torch', 'dask', 'pandas'}"
    code = f"import sys; from dfkd_lib.reproduction import cli; cli.main(['list']); print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"
