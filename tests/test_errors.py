"""Values in messages: shown, and never whole where they are long."""

from __future__ import annotations

import pytest

from mllm_vision.errors import short


class Angry:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000_000, b"\xff" * 10_000_000, [["y" * 300] * 50] * 50, {f"k{i}": "z" * 99 for i in range(99)}, 10**999],
    ids=["str", "bytes", "list", "dict", "int"],
)
def test_long_values_are_cut(value) -> None:
    assert 2 < len(short(value)) <= 200
    assert len(short(value, 40)) <= 40


def test_short_values_are_their_repr() -> None:
    for value in ("a 'quoted'\nline", 3, None, [1, "b"], {"a": 1}, b"abc", 2.5, ("x",)):
        assert short(value) == repr(value)
    assert short(bytearray(100)) == "<100 bytes>"
    assert "Angry" in short(Angry()), "a repr that raises hides no message"
    assert "int" in short(10**9999)
