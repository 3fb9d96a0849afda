from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.support.dataset_jobs import content, fake_tokenizer, write_pictures
from tests.support.fake_cuda import FakeCuda
from tests.support.file_faults import ERRORS, file_faults
from tests.support.waiting import PATIENCE
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.cli import encode as encode_command
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli import tokenize as command
from tokenflow_sdk.cli.parser import make_parser
from tokenflow_sdk.dataset.job_lock import job_lock
from tokenflow_sdk.dataset.outputs import STATE
from tokenflow_sdk.dataset.progress import Snapshot
from tokenflow_sdk.dataset.reading import read_codes
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import StorageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "in", 10, bad=(3,))
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with a tokenizer without an engine."""

    def run(*words: object, sha256: str = "ab" * 32) -> int:
        monkeypatch.setattr(command, "_open", lambda arguments: [fake_tokenizer(sha256=sha256)])
        return main(["tokenize", *map(str, words)])

    return run


Run = Callable[..., int]
Output = pytest.CaptureFixture[str]


def test_a_directory_becomes_codes_and_the_same_command_has_nothing_to_do(run: Run, capsys: Output) -> None:
    assert run("in", "-o", "out", "--shard-size", 4) == 0
    said = capsys.readouterr()
    assert "out  10 pictures in 3 of 3 shards, 10 of them now at " in said.out
    assert "rows with an error: 1 CorruptImageError; --retry-errors tries them again" in said.err
    with fake_tokenizer() as tokenizer:
        found = dict(read_codes("out"))
        assert found == {path.name: tokenizer.encode(path) for path in Path("in").iterdir() if path.name != "003.png"}
    before = content(Path("out"))
    assert run("in", "-o", "out", "--shard-size", 4) == 0
    assert "nothing to do: all 3 shards are done" in capsys.readouterr().err
    assert content(Path("out")) == before
    assert run("--verify", "out") == 0
    assert "complete and equal" in capsys.readouterr().out


def test_an_output_file_that_was_cut_is_said_and_made_again(run: Run, here: Path, capsys: Output) -> None:
    assert run("in", "-o", "out", "--shard-size", 4) == 0
    right, path = content(Path("out")), here / "out" / "00001.parquet"
    path.write_bytes(right[path.name][:100])
    assert run("in", "-o", "out", "--shard-size", 4) == 0
    said = f"warning: {path} has 100 of the {len(right[path.name])} bytes that were written: shard 00001 is made again."
    assert said in capsys.readouterr().err
    assert content(Path("out")) == right


def test_bad_pictures_that_were_mended_are_tried_again(run: Run, capsys: Output) -> None:
    assert run("in", "-o", "out") == 0
    write_pictures(Path("in"), 10)
    assert run("in", "-o", "out") == 2
    assert "Where bad pictures were mended, give --retry-errors." in capsys.readouterr().err
    assert run("in", "-o", "out", "--retry-errors") == 0
    assert "rows with an error" not in capsys.readouterr().err
    assert len(list(read_codes("out", errors="raise"))) == 10


def test_the_same_command_goes_on_where_the_output_lies_below_a_pattern(run: Run, here: Path, capsys: Output) -> None:
    with tarfile.open(here / "in" / "a.tar", "w") as archive:
        archive.add("in/000.png")
    assert run("in/**/*.tar", "-o", "in/codes", "--format", "webdataset") == 0
    assert run("in/**/*.tar", "-o", "in/codes", "--format", "webdataset") == 0
    assert "nothing to do: all 1 shards are done" in capsys.readouterr().err


def test_json_lines_are_for_machines(run: Run, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_EVERY", 0)
    assert run("in", "-o", "out", "--shard-size", 4, "--json") == 0
    *progress, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert progress
    assert all(line["event"] == "progress" for line in progress)
    assert {"pictures", "errors", "rate", "left", "bottleneck"} <= progress[0].keys()
    assert (summary["event"], summary["pictures"], summary["errors"]) == ("summary", 10, {"CorruptImageError": 1})
    stored = json.loads(Path("out", STATE, "summary.json").read_text())
    assert summary == {"event": "summary", **stored}
    assert run("--verify", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_off_a_terminal_lines_say_how_far_it_is(run: Run, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Snapshot(12345, 3, 400, 12, 1, 100.0, 20000, "encode")
    assert command._line(seen) == (
        "tokenizing: 12,345 of 20,000 pictures, 3 errors, 12 of 400 shards, 1 failed, 123.5 pictures/s, 0:01:02 left; "
        "encode is busiest"
    )
    monkeypatch.setattr(command, "_EVERY", 0)
    assert run("in", "-o", "out") == 0
    assert "tokenizing: " in capsys.readouterr().err
    assert run("in", "-o", "quiet", "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_shards_that_fail_are_listed_and_the_status_is_1(run: Run, here: Path, capsys: Output) -> None:
    (here / "a.tar").write_bytes(b"no tar" * 200)
    assert run("in", "a.tar", "-o", "out") == 1
    said = capsys.readouterr()
    assert f"error: shard 00001 ({here / 'a.tar'}): " in said.err
    assert "1 of 2 shards failed; the same command tries them again" in said.err
    assert "10 pictures in 1 of 2 shards" in said.out


def test_pictures_that_a_storage_does_not_give_are_said_and_tried_again(
    run: Run, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Storage.read

    def read(storage: Storage, name: str = "", *arguments: Any) -> bytes:
        if name == "004.png":
            raise StorageError("004.png cannot be read: 403.", "Check its permissions.") from PermissionError("403")
        return plain(storage, name, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "read", read)
        assert run("in", "-o", "out") == 1
    assert "pictures that their storage did not give: 1; the same command tries them again" in capsys.readouterr().err
    assert run("in", "-o", "out") == 0
    assert len(list(read_codes("out", errors="skip"))) == 9
    assert run("in", "-o", "out") == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "No pictures were named."),
        ("in", "No output was named. Give a directory or an address with -o."),
        ("nowhere -o out", "nowhere does not exist."),
        ("empty -o out", "holds no pictures."),
        ("in -o out --also pixels", "--also pixels is nothing that is stored. Choose of: features, semantic."),
        ("in -o out --scales 3", "--scales 3 is no number of scales of fake."),
        ("in -o out --shard-size 0", "--shard-size 0 is no number of pictures for a shard."),
        ("in -o out --shard 3/2", "--shard 3/2 is no part of a job."),
        ("in -o out --shard 1/2 --ray auto", "--shard and --ray both divide a job."),
        ("in -o in/000.png", "000.png cannot be read: Not a directory."),
        ("in -o empty/full", "holds a.parquet and is not the output of a job."),
        ("--verify empty", "holds no output of `tokenflow tokenize`."),
        ("in --verify out", "--verify takes the output of a job and nothing else."),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(words: str, said: str, run: Run, here: Path, capsys: Output) -> None:
    (here / "empty" / "full").mkdir(parents=True)
    (here / "empty" / "full" / "a.parquet").write_bytes(b"")
    assert run(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert list(here.rglob(STATE)) == []


def test_another_bundle_input_or_option_is_refused(run: Run, capsys: Output) -> None:
    assert run("in", "-o", "out") == 0
    assert run("in", "-o", "out", sha256="cd" * 32) == 2
    assert run("in", "-o", "out", "--fast") == 2
    write_pictures(Path("in"), 11, bad=(3,))
    assert run("in", "-o", "out") == 2
    errors = capsys.readouterr().err
    for said in ("began with another bundle", "began with another --fast", "has other files or other sizes"):
        assert said in errors
    assert run("in", "-o", "other") == 0


def test_a_second_run_into_an_output_is_refused(run: Run, here: Path, capsys: Output) -> None:
    with job_lock(Storage("out"), STATE, None):
        assert run("in", "-o", "out") == 2
        assert f"error: Another run writes {here / 'out'} already. Wait until it ends" in capsys.readouterr().err
        assert run("in", "-o", "out", "--shard", "1/2") == 2
    assert run("in", "-o", "out", "--shard", "1/2") == 0


def test_tasks_make_the_whole_together(run: Run, capsys: Output) -> None:
    assert run("in", "-o", "whole", "--shard-size", 2) == 0
    left = [Path("out", f".0000{i}.parquet-{'0' * 12}.partial") for i in range(3)]
    left += [Path("out", STATE, "done", f".0000{i}.json-{'0' * 12}") for i in range(3)]
    for task in ("2/3", "1/3", "3/3"):
        Path("out", STATE, "done").mkdir(parents=True, exist_ok=True)
        for path in left:
            path.touch()
        assert run("in", "-o", "out", "--shard-size", 2, "--shard", task) == 0
        # What a killed task left is deleted, and others may be writing theirs.
        assert [path.exists() for path in left] == 2 * [owner != task for owner in ("1/3", "1/3", "2/3")]
    assert "in 2 of 2 shards" in capsys.readouterr().out
    for path in left:
        path.unlink(missing_ok=True)
    assert content(Path("out")) == content(Path("whole"))
    assert json.loads(Path("out", STATE, "summary-2-of-3.json").read_text())["task"] == "2/3"


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals are sent to the main thread")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_says_how_far_it_is_and_what_goes_on(
    number: int, status: int, run: Run, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*arguments: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(command, "run_local", press)
    assert run("in", "-o", "out") == status
    assert "0 of 1 shards are done; the same command goes on\ninterrupted" in capsys.readouterr().err
    assert threading.active_count() < 20


@pytest.mark.skipif(os.name == "nt", reason="signals are sent")
@pytest.mark.parametrize(
    ("hangs", "words"),
    [
        ("cat_file:/in/", "memory://in -o out"),
        ("open:/tars/", "memory://tars/*.tar -o out"),
        ("info:/in/", "memory://in/{000..039}.png -o out"),
        ("put_file:/out/", "memory://in -o memory://out"),
        ("pipe_file:/done/", "memory://in -o memory://out"),
        ("cat_file:/done/", "memory://in -o memory://made --shard-size 8 --format webdataset"),
    ],
)
def test_ctrl_c_does_not_wait_for_a_bucket_that_hangs(hangs: str, words: str) -> None:
    command = [sys.executable, "-m", "tests.support.hanging_storage", hangs, "tokenize", *words.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, said.splitlines()[-1:]) == (130, ["interrupted"])
    assert [path for path in Path("out").rglob("*") if STATE not in path.parts and path.is_file()] == []


def arguments(words: str) -> argparse.Namespace:
    return make_parser().parse_args(["tokenize", *words.split()])


def test_each_of_several_devices_gets_a_tokenizer(mini_bundle: Path, machine: tuple[FakeCuda, object]) -> None:
    machine[0].gpus = 2
    assert command._devices(arguments("in")) == ["auto"]
    assert command._devices(arguments("in --devices all")) == ["cuda:0", "cuda:1"]
    assert command._devices(arguments("in --devices cuda:1,cpu")) == ["cuda:1", "cpu"]
    with ExitStack() as stack:
        opened = [
            stack.enter_context(each) for each in command._open(arguments(f"in --devices cpu,cpu --bundle {mini_bundle}"))
        ]
        assert len({id(each) for each in opened}) == 2
    for words in ("--devices all --device cpu", "--devices all --ray auto"):
        assert main(["tokenize", "in", "-o", "out", *words.split()]) == 2


def test_a_cpu_has_at_most_eight_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores in (1, 2, 8, 9, 15, 16, 17, 64):
        monkeypatch.setattr(command, "available_cores", lambda cores=cores: cores)
        opened = list[Any]()
        monkeypatch.setattr(Tokenizer, "open", lambda name, options, *_, opened=opened: opened.append(options))
        command._open(arguments("in"))
        assert cores // opened[0].threads <= 8


def test_pictures_become_the_codes_of_encode(tokenizer: Tokenizer, mini_bundle: Path) -> None:
    assert main(["tokenize", "in", "-o", "out", "--bundle", str(mini_bundle), "--format", "webdataset", "-q"]) == 0
    found = dict(read_codes("out"))
    assert found == {name: tokenizer.encode(Path("in", name)) for name in found}
    assert len(found) == 9


def test_encode_names_it_where_a_directory_is_large(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(encode_command, "open_tokenizer", lambda *_: fake_tokenizer())
    assert main(["encode", "in", "-o", "codes"]) == 1
    assert "tokenflow tokenize" not in capsys.readouterr().err
    monkeypatch.setattr(encode_command, "_LARGE", 9)
    assert main(["encode", "in", "-o", "codes"]) == 1
    assert "10 pictures: `tokenflow tokenize` writes the codes of so many to few files" in capsys.readouterr().err


def test_of_warnings_about_pictures_the_first_is_shown_and_the_others_are_counted(run: Run, capsys: Output) -> None:
    for path in Path("in").iterdir():
        Image.new("RGB", (9, 8)).save(path, icc_profile=b"no profile")
    assert run("in", "-o", "out") == 0
    error = capsys.readouterr().err
    assert error.count("warning: ") == 2
    assert "its colour profile is not applied" in error
    assert "warning: 9 more pictures with a ColorProfileWarning" in error


def test_whatever_file_operation_on_the_output_fails_the_same_command_mends_it(run: Run, here: Path, capsys: Output) -> None:
    words = ["in", "--shard-size", 4, "-o"]
    with file_faults([here / "right"]) as faults:
        assert run(*words, "right") == 0
    right = content(here / "right")
    assert len(faults.operations) > 60
    # Every operation was tried once; here some of them are, of all kinds.
    for number in range(0, len(faults.operations), 13):
        output = here / f"out{number}"
        with file_faults([output], number, ERRORS[number % len(ERRORS)]):
            assert run(*words, output) in (0, 1, 2)
        found = content(output) if output.exists() else {}
        assert found.items() <= right.items(), faults.operations[number]
        assert run(*words, output) == 0, faults.operations[number]
        assert content(output) == right
    assert "Traceback" not in capsys.readouterr().err
