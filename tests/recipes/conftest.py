"""What the tests of recipes share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every attempt to reach the network fails and is remembered; any attempt fails the test, even one swallowed.

    The offline switch of the Hugging Face libraries is off meanwhile: with it on, nothing could be seen.
    """
    import datasets
    import huggingface_hub

    attempts: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(repr(args))
        raise OSError(f"no network here: {args!r}")

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> Any:  # worker processes talk over the file system
        return connect(self, address) if self.family == socket.AF_UNIX else refuse("connect", address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    for name in ("connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert not huggingface_hub.is_offline_mode()
    with pytest.raises(OSError, match="no network here"):
        socket.create_connection(("127.0.0.1", 9))
    assert len(attempts) == 1  # so it can fail
    attempts.clear()
    yield attempts
    assert attempts == []
