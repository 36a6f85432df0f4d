"""Clients that somebody else's control plane starts know whether their server is to come, is there, or has gone."""

from __future__ import annotations

import socket
import time

import pytest

from flexp import door as doors
from flexp.carried import take_part
from flexp.door import Door, Held
from flexp.errors import LinkLostError, StoppedError


def test_a_client_waits_for_a_server_to_come_and_leaves_one_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "GONE", 0.2)
    with Held("127.0.0.1", 0) as held:
        place = "127.0.0.1", int(held.port)
        door = Door(*place)
        for _ in range(3):
            with pytest.raises(LinkLostError, match="not there yet") as turned_away:
                door.look()
            assert not isinstance(turned_away.value, StoppedError)
            time.sleep(0.15)
        held.give()
        assert held.given
        with pytest.raises(StoppedError, match="before its server was there"):
            held.give()
        with socket.create_server(place):  # the address is free at once
            door.look()
    with pytest.raises(LinkLostError, match="not there yet"):
        door.look()
    time.sleep(0.2)
    with pytest.raises(StoppedError, match="the server has gone"):
        door.look()
    monkeypatch.setattr(doors, "GONE", 0.0)
    start = {"server": f"grpcs://127.0.0.1:{held.port}", "token": "", "ca": "", "content": "{}"}
    assert take_part(start, {"name": "north", "state": "nowhere"}) == {"name": "north", "over": False}
