from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tokenflow_export.model_card import CARD, checkpoint_source, write_card
from tokenflow_sdk.bundle.bundle import open_bundle

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("TokenFlow-llava", "TokenFlow-llava"),
        ("here/.", "here"),
        ("here/deep/..", "here"),
        ("/tmp/tmpab12_x9z", "unnamed"),  # noqa: S108
        ("/var/tmp/tmp.Xa8dKe2Q1z", "unnamed"),  # noqa: S108
        ("/tmp/tmpab12_x9z/llava", "llava"),  # noqa: S108
        ("tokenizer.pt", "tokenizer.pt"),
    ],
)
def test_a_checkpoint_is_named_but_not_by_a_temporary_directory(path: str, name: str) -> None:
    assert checkpoint_source(Path(path)) == {"checkpoint": name}


def test_a_checkpoint_in_the_hubs_cache_is_named_as_on_the_hub(tmp_path: Path) -> None:
    blob = tmp_path / "hub" / "models--org--the--name" / "blobs" / "ab"
    snapshot = tmp_path / "hub" / "models--org--the--name" / "snapshots" / COMMIT
    (snapshot / "deep").mkdir(parents=True)
    blob.parent.mkdir()
    blob.touch()
    (snapshot / "deep" / "x.pt").symlink_to(blob)
    assert checkpoint_source(snapshot) == {"checkpoint": "org/the--name", "checkpoint_revision": COMMIT}
    assert checkpoint_source(snapshot / "deep" / "x.pt")["checkpoint"] == "org/the--name/deep/x.pt"


def front_matter(card: Path) -> dict[str, object]:
    _, front, _ = card.read_text().split("---\n", 2)
    return {line.partition(": ")[0]: json.loads(line.partition(": ")[2]) for line in front.splitlines()}


def test_every_bundle_has_a_card(mini_bundle: Path, mini_generator: Path, mini_understander: Path) -> None:
    tasks = {mini_bundle: "image-feature-extraction", mini_generator: "text-to-image", mini_understander: "image-text-to-text"}
    for path, task in tasks.items():
        card = path / CARD
        assert front_matter(card) == {"library_name": "tokenflow-sdk", "pipeline_tag": task, "tags": ["tokenflow", "onnx"]}
        assert "not recorded at export. Say it here before you publish" in card.read_text()
        assert CARD not in {file.name for file in open_bundle(path).files()}


def test_a_card_says_licence_and_origin_and_may_be_edited(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    found = {"checkpoint": "org/name/x.pt", "checkpoint_revision": COMMIT}
    for given, words in (("MIT", {"license": "mit"}), ("my: own", {"license": "other", "license_name": "my: own"})):
        write_card(replace(bundle, provenance={**found, "license": given}))
        expected = words | {"base_model": "org/name"}
        assert expected.items() <= front_matter(bundle_copy / CARD).items()
        text = (bundle_copy / CARD).read_text()
        assert f"| license | {given} |" in text
        assert "from `org/name/x.pt`" in text
        assert 'Tokenizer.from_pretrained("ORG/NAME")' in text
    (bundle_copy / CARD).write_text("mine")
    open_bundle(bundle_copy).verify()
