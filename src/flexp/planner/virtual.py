"""A plan on the virtual clock: how long rounds of it would take, with queues at the server."""

from __future__ import annotations

from collections.abc import Mapping

from flexp.cost.clock import SPLIT_ASYNC, ClientWork, Virtual, simulate
from flexp.cost.profile import Profile
from flexp.planner.fleet import Fleet
from flexp.planner.options import Option


def virtual_time(fleet: Fleet, options: Mapping[str, Option], steps: int = 20) -> Virtual:
    """Let everybody make ``steps`` steps, nobody waiting for anybody (``split-async``).

    The clock's operations are predicted seconds here, on devices that do one a second: a client's are spread over its
    step's three parts, the server's over forward and backward as 1 : 2, bytes over the four messages.
    """
    work, devices = {}, {}
    for device in fleet.devices:
        option = options[device.name]
        found, exchanges = option.prediction, option.choice.accumulation
        client, server = found.client_seconds / exchanges, found.server_seconds / exchanges
        work[device.name] = ClientWork(
            steps=[steps],
            before=client / 3.0,
            between=client / 3.0,
            after=client / 3.0,
            server_forward=server / 3.0,
            server_backward=2.0 * server / 3.0,
            forward_up=found.bytes_up / exchanges / 2.0,
            backward_up=found.bytes_up / exchanges / 2.0,
            forward_down=found.bytes_down / exchanges / 2.0,
            backward_down=found.bytes_down / exchanges / 2.0,
            exchanges=exchanges,
        )
        devices[device.name] = _seconds(device.profile)
    return simulate(SPLIT_ASYNC, work, devices, _seconds(fleet.server), slots=fleet.slots)


def _seconds(device: Profile) -> Profile:
    return device.model_copy(update={"flops": 1.0})
