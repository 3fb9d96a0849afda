from __future__ import annotations

from pathlib import Path

import pytest

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.server.app import create_app
from tokenflow_sdk.server.settings import Settings, read_keys, settings_from


def test_flags_go_before_variables_and_these_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "0.0.0.0"\ntimeout = 5\naliases = ["a", "b"]\n')
    monkeypatch.setenv("TOKENFLOW_SERVE_HOST", "10.0.0.1")
    monkeypatch.setenv("TOKENFLOW_SERVE_TIMEOUT", "6")
    monkeypatch.setenv("TOKENFLOW_SERVE_CORS_ORIGINS", '["https://a.example"]')
    found = settings_from({"timeout": "7"}, file)
    assert (found.port, found.host, found.timeout) == (1, "10.0.0.1", 7.0)
    assert (found.aliases, found.cors_origins) == (("a", "b"), ("https://a.example",))
    assert settings_from({}).port == 8080


@pytest.mark.parametrize(
    "values", [{"port": "x"}, {"port": 70000}, {"timeout": 0}, {"max_queue": 0}, {"unknown": 1}, {"cors_origins": ["a b"]}]
)
def test_settings_that_cannot_work_are_named(values: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(values))):
        settings_from(values)


def test_several_values_that_are_no_list_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serve.toml").write_text("port = 1")
    monkeypatch.setenv("TOKENFLOW_SERVE_CORS_ORIGINS", "https://a.example")
    for file in (None, tmp_path / "serve.toml"):
        with pytest.raises(ArgumentError, match=r"TOKENFLOW_SERVE_CORS_ORIGINS.*JSON list"):
            settings_from({}, file)
    with pytest.raises(ArgumentError, match="TOKENFLOW_SERVE_CORS_ORIGINS"):
        create_app()
    monkeypatch.delenv("TOKENFLOW_SERVE_CORS_ORIGINS")
    monkeypatch.setenv("TOKENFLOW_SERVE_TIMEOUT", "soon")
    with pytest.raises(ArgumentError, match="timeout='soon'"):
        create_app()


def test_files_that_are_no_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("port = ")
    (tmp_path / "unknown.toml").write_text("prt = 1")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "bad.toml", "unknown.toml", "binary.toml", ""):
        with pytest.raises(ArgumentError):
            settings_from({}, tmp_path / name)


def test_a_server_for_this_machine_is_called_by_its_names_only() -> None:
    assert "localhost" in Settings().hosts
    assert Settings(host="0.0.0.0").hosts == ("*",)  # noqa: S104
    assert Settings(allowed_hosts=("a.example",)).hosts == ("a.example",)


def test_keys_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# two\n a \n\nb\n")
    assert read_keys(file) == (b"a", b"b")
    assert read_keys(None) == ()
    file.write_text("# none\n")
    for wrong in (file, tmp_path / "missing", tmp_path):
        with pytest.raises(ArgumentError):
            read_keys(wrong)
    file.write_bytes(b"\xff")
    with pytest.raises(ArgumentError, match="UTF-8"):
        read_keys(file)
