from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.digest import canonical_json, ids_digest, sha256_of_bytes, sha256_of_file, sha256_of_json

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_a_round_trip_keeps_text_and_digest(data: Any) -> None:
    again = json.loads(canonical_json(data))
    assert again == data
    assert sha256_of_json(again) == sha256_of_json(data)


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_says_nothing(data: dict[str, int]) -> None:
    assert sha256_of_json(dict(reversed(list(data.items())))) == sha256_of_json(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_is_no_number_has_no_digest(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        sha256_of_json(value)


def test_known_digests() -> None:
    assert canonical_json({"b": 1, "a": ["ε", 0.5, None]}) == '{"a":["ε",0.5,null],"b":1}'
    assert sha256_of_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert ids_digest([3, 1, 2]) == hashlib.sha256(b"3,1,2").hexdigest()
    assert ids_digest([1, 2, 3]) != ids_digest([3, 2, 1])
    assert ids_digest([1, 23]) != ids_digest([12, 3])


def test_a_file_hashes_as_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 5000)
    assert sha256_of_file(tmp_path / "f") == sha256_of_bytes(bytes(range(256)) * 5000)
