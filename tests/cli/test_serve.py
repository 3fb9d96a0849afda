from __future__ import annotations

import sys

import pytest

from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.serve import make_parser
from tokenflow_sdk.server.settings import Settings


def test_every_setting_is_a_flag_with_its_default() -> None:
    parser = make_parser()
    flags = {action.dest for action in parser._actions}
    assert set(Settings.model_fields) <= flags
    assert all(value is None for name, value in vars(parser.parse_args([])).items() if name in Settings.model_fields)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("tokenflow_sdk.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert "pip install 'tokenflow-sdk[cpu,generate,serve]'" in capsys.readouterr().err
