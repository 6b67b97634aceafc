"""Digests of values and files."""

import hashlib
from pathlib import Path

from longrope2_ray.storage.digests import digest, file_digest


def test_a_digest_depends_on_the_value_and_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert digest([1.5]) == hashlib.sha256(b"[1.5]").hexdigest()


def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
