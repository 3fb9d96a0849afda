"""Says of a bundle where its weights came from and what may be done with them: provenance, and a model card for the hub."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.files import write_atomic

__all__ = ["CARD", "checkpoint_source", "write_card"]

CARD = "README.md"
"""The card's file name in the bundle, as the hub wants it."""
_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}|tmp\.\w{6,}")
_HUB_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "openrail++"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "unknown"),
)
"""Licences that the hub's front matter has a word for; it calls others `other` and takes a name beside it."""
_KINDS = {
    "tokenizer": ("image-feature-extraction", "Tokenizer", "an image tokenizer: pictures to code indices and back"),
    "generator": ("text-to-image", "Generator", "a text-to-image model"),
    "understander": ("image-text-to-text", "Understander", "a model that answers questions about pictures"),
}
_CARD = """\
{front}
# {title}

{what}, exported from `{checkpoint}` to ONNX for [tokenflow-sdk](https://pypi.org/project/tokenflow-sdk/). It runs without
PyTorch, on onnxruntime or TensorRT.

```bash
pip install 'tokenflow-sdk[{extras}]'
```

```python
from tokenflow_sdk import {name}

model = {name}.from_pretrained("ORG/NAME")
```

## Licence of the weights

{license}

## Compared with PyTorch at export

```json
{parity}
```

## Provenance

| | |
| --- | --- |
{provenance}
"""


def checkpoint_source(path: Path) -> dict[str, str]:
    """The name of a checkpoint's file or directory for a bundle's provenance, and its commit if it lies in the hub's cache.

    The hub's names are `org/name` and `org/name/file`. Directories in which others are not found again have none.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - links in the hub's cache lead to files named by their hashes
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/.+)?$", path.as_posix())
    if cached is not None:
        owner, name, commit, inside = cached.groups()
        return {"checkpoint": f"{owner}/{name}{inside or ''}", "checkpoint_revision": commit}
    temporary = _TEMPORARY.fullmatch(path.name) or path == Path(tempfile.gettempdir())
    return {"checkpoint": "unnamed" if temporary else path.name}


def write_card(bundle: Bundle[Any]) -> None:
    """Write the model card of a bundle that is being exported into its directory.

    It is not listed in bundle.json, so that it may be edited before the bundle is published.

    Raises:
        OutputError: it cannot be written.
    """
    task, name, what = _KINDS[bundle.config.kind]
    source, license_name = bundle.provenance, bundle.provenance.get("license")
    text = _CARD.format(
        front=_front_matter(task, source),
        title=f"TokenFlow {bundle.config.kind}: {source['checkpoint'].rpartition('/')[2]}",
        what=what[0].upper() + what[1:],
        checkpoint=source["checkpoint"],
        extras="cpu,hub" if bundle.config.kind == "tokenizer" else "cpu,generate,hub",
        name=name,
        license=license_name or "It was not recorded at export. Say it here before you publish the bundle.",
        parity=json.dumps({key: value for key, value in bundle.parity.items() if not isinstance(value, list)}, indent=2),
        provenance="\n".join(f"| {key} | {value} |" for key, value in source.items()),
    )
    write_atomic(bundle.path / CARD, text.encode())


def _front_matter(task: str, source: Mapping[str, Any]) -> str:
    """What the hub reads, in YAML, of which JSON is a part."""
    entries: dict[str, Any] = {"library_name": "tokenflow-sdk", "pipeline_tag": task, "tags": ["tokenflow", "onnx"]}
    if (name := source.get("license")) is not None:
        entries |= {"license": name.lower()} if name.lower() in _HUB_LICENSES else {"license": "other", "license_name": name}
    if "checkpoint_revision" in source:
        entries["base_model"] = "/".join(source["checkpoint"].split("/")[:2])
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in entries.items()), "---"])
