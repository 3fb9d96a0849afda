from __future__ import annotations

import argparse
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.exit_status import run
from tokenflow_sdk.cli.option_names import _OPTIONS, as_options
from tokenflow_sdk.cli.parser import make_parser

PHOTO = ROOT / "examples" / "chelsea.jpg"
WRONG = {
    "--bundle": "encode {photo} --bundle nowhere",
    "--revision": "encode {photo} --revision main",
    "--sha256": "encode {photo} --sha256 12",
    "--device": "encode {photo} --device tpu",
    "--config": "encode {photo} --config abacus",
    "--threads": "encode {photo} --threads 0",
    "--batch-limit": "encode {photo} --batch-limit 0",
    "--max-pixels": "encode {photo} --max-pixels 100 --bundle {tokenizer}",
    "--scales": "decode p.tfc --scales 40 --bundle {tokenizer}",
    "--tokenizer": "generate w5 --tokenizer nowhere --bundle {generator}",
    "--replay": "generate --replay nowhere.png",
    "-n": "generate w5 -n 0 --bundle {generator}",
    "--preset": "generate w5 --preset best",
    "--seed": "generate w5 --seed -1",
    "--cfg-scale": "generate w5 --cfg-scale -2",
    "--max-tokens": "ask {photo} what? --bundle x --max-tokens 0",
    "--temperature": "ask {photo} what? --bundle x --temperature -2",
    "--top-p": "ask {photo} what? --bundle x --top-p 7",
    "--top-k": "ask {photo} what? --bundle x --top-k 0",
    "--repetition-penalty": "ask {photo} what? --bundle x --repetition-penalty 0",
    "--batch-sizes": "bench {tokenizer} --batch-sizes 0",
    "--also": "tokenize {photo} -o out --also pixels",
    "--shard-size": "tokenize {photo} -o out --shard-size 0",
    "--shard": "tokenize {photo} -o out --shard 3/2",
    "--devices": "tokenize {photo} -o out --devices tpu",
    "--verify": "tokenize --verify nowhere",
    "--repeat": "bench {tokenizer} --repeat 0",
    "--batch-usual": "build --batch-usual 9",
    "--target": "build --target ampere?",
    "--pages": "build --pages -1",
    "--workspace-gb": "build --workspace-gb -1",
    "--memory-gb": "build --memory-gb -1",
}
"""A command with a value that each option does not take."""
ANYTHING = {"-o", "--json", "--cache", "--negative-prompt", "--triton", "--image-column", "--key-column", "--ray"}
"""Options that take whatever they are given, or fail where a file cannot be written, a column or a cluster is not there."""
PYTHON = re.compile(r"(?<!-)\b[a-z_0-9]+=|\bNone\b|\bTrue\b|\bFalse\b|\b[a-z]+_[a-z]+\b")


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Options that take a value of any kind, of a parser and those below it."""
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name for each in action.choices.values() for name in options(each)}
        elif action.option_strings and action.nargs != 0 and action.choices is None:
            found.add(action.option_strings[0])
    return found


def test_every_option_is_here() -> None:
    assert options(make_parser()) == {*WRONG, *ANYTHING}


@pytest.mark.parametrize("option", [*WRONG, "build --batch-limit"])
def test_what_an_option_does_not_take_is_said_in_its_words(
    option: str,
    mini_bundle: Path,
    mini_generator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        tokenizer.codes(np.zeros(30, int)).save("p.tfc")
    line = WRONG.get(option, f"{option} 0")
    assert main(line.format(photo=PHOTO, tokenizer=mini_bundle, generator=mini_generator).split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.endswith(".")
    assert "\n" not in error
    own = error.replace(str(mini_bundle), "").replace(str(mini_generator), "").replace("mini_clip", "")
    assert not PYTHON.search(own), own
    value = line.partition(f"{option.split()[-1]} ")[2].split()[0]
    assert (option.split()[-1] if value.lstrip("-").isdigit() else value) in own


def test_the_names_are_those_of_options() -> None:
    having_choices = {"--backend", "--color", "--preprocess"}
    assert {*_OPTIONS.values()} <= options(make_parser()) | having_choices


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_scales=40 is too much.", "--scales 40 is too much."),
        ("device='cuda', but no GPU. Use device='cpu'.", "--device cuda, but no GPU. Use --device cpu."),
        ("seed=-1 (batch_limit=1).", "--seed -1 (--batch-limit 1)."),
        ("cfg_scale=1e-05 or top_p=0.5.", "--cfg-scale 1e-05 or --top-p 0.5."),
        ("revision='' is none.", "--revision '' is none."),
        ('sha256="it\'s" is none.', "--sha256 'it'\"'\"'s' is none."),
        (r"sha256='\'a\' \"b\"' is none.", "--sha256 ''\"'\"'a'\"'\"' \"b\"' is none."),
        ("Leave backend= or build_config= out.", "Leave --backend or --config out."),
        ("Give tokenizer=, a path.", "Give --tokenizer, a path."),
        # Paths, and arguments that no option gives.
        ("data/seed=3/a.png and seed=3/a.png and seed=3.png cannot be read.", None),
        ("page_size=47 and local_files_only=False and TOKENFLOW_CACHE_GB='x' and run=1.", None),
    ],
)
def test_arguments_in_a_sentence_become_options(text: str, said: str | None) -> None:
    assert as_options(text) == (said or text)


def test_warnings_and_the_log_are_said_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        warnings.simplefilter("always")
        warnings.warn("Encode with preprocess='pad'.", UserWarning, stacklevel=1)
        logging.getLogger("tokenflow_sdk").warning("device=%r says why.", "cuda")
        return 0

    assert run(command) == 0
    assert capsys.readouterr().err == "warning: Encode with --preprocess pad.\nwarning: --device cuda says why.\n"


def test_errors_of_some_of_several_files_are_said_so_too(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        Codes(np.zeros(1, int), (1, 2), 500, "mini_clip", "ab" * 8).save(tmp_path / f"{i}.tfc")
    assert main(["decode", str(tmp_path), "-o", str(tmp_path), "--bundle", str(mini_bundle), "--scales", "2"]) == 1
    assert capsys.readouterr().err.count("error: --scales 2 is no number of scales") == 2
