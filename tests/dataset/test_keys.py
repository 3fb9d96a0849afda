from __future__ import annotations

import pytest

from tokenflow_sdk.dataset import keys
from tokenflow_sdk.dataset.inputs import InputOptions, find_shards
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import DatasetError


def test_directories_that_give_a_key_twice_are_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(place)
    for name in ("train/a/0.jpg", "train/b.jpg", "val/a/0.jpg", "val/c.jpg", "other/a/0.png", "named.jpg"):
        storage.write(name, b"1")
    train, val, other, named = (storage.path(name) for name in ("train", "val", "other", "named.jpg"))
    for inputs in ([train, val], [val, named, train], [f"{val}/**", other, train]):
        with pytest.raises(DatasetError, match=r"train and .*val would both give the key a/0\.jpg\. Give the directory above"):
            list(find_shards(inputs))
    with pytest.raises(DatasetError, match=r"give the key b\.jpg\. Give patterns that do not overlap"):
        list(find_shards([f"{train}/**/*.jpg", f"{train}/b*"]))
    for inputs in ([train, other, named], [f"{train}/**", f"{val}/c*"], [storage.path("[tv]*/**")]):
        assert list(find_shards(inputs))
    monkeypatch.setattr(keys, "_MOST_COMPARED", 1)
    assert list(find_shards([train, val]))


def test_parquet_files_of_one_name_need_a_column_of_keys(place: str) -> None:
    storage = Storage(place)
    for name in ("a/x.parquet", "b/x.parquet", "b/y.pq"):
        storage.write(name, b"")
    for inputs in ([storage.path("*/*")], [storage.path("a/x.parquet"), storage.path("b/x.parquet")]):
        with pytest.raises(DatasetError, match=r"a/x.parquet and .*b/x.parquet .* the key x/0\. Give --key-column"):
            list(find_shards(inputs))
        assert len(list(find_shards(inputs, InputOptions(key_column="id")))) >= 2
    assert len(list(find_shards([storage.path("b/*")]))) == 2
