"""FlexP on Flower (``pip install "flexp[flower]"``): Flower delivers the app, knows and starts the nodes, stops, keeps
logs and history; all else is :mod:`flexp.carried`'s. What is the node's own (its data, cut and state) stands in its
``--node-config``. See docs/how-to/flower.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler  # a saved state may take longer than the 5 s that a ServerApp has else

from flexp.carried import DAYS, Nodes, conduct, take_part
from flexp.errors import ConfigError


def server_app(config: Path) -> ServerApp:
    """A ServerApp that conducts the run of a ``CONFIG.toml``, which names its clients (``deployment.clients``).

    Of the run's configuration (``flwr run -c``) it reads what :func:`flexp.carried.conduct` wants.
    """

    def main(grid: Grid, context: Context) -> None:
        options = {key: str(value) for key, value in context.run_config.items()}
        conduct(
            lambda start: SuperNodes(grid, start),
            options,
            Path(config),
            lambda end: add_exit_handler(end, run_before_force_exit=True),
        )

    app = ServerApp()
    app.main()(main)
    return app


def client_app() -> ClientApp:
    """A ClientApp that takes part with what its node has.

    Of the node's configuration it reads ``name``, ``data`` (its own file), ``cut`` (S:E; else as the run's
    configuration says) and ``state`` (a folder). In Flower's simulation, nodes are the run's clients in their order,
    and their state is in the folder ``clients`` of the server's.
    """
    app = ClientApp()
    app.train()(_take_part)
    return app


class SuperNodes(Nodes):
    """Flower's."""

    def __init__(self, grid: Grid, start: dict[str, Any]) -> None:
        super().__init__(start)
        self._grid = grid

    def there(self) -> Iterable[Any]:
        return list(self._grid.get_node_ids())

    def send(self, node: Any) -> str | None:
        content = RecordDict({"flexp": ConfigRecord(self.start)})
        sent = Message(content, dst_node_id=node, message_type="train", ttl=DAYS * 86400.0)
        return next(iter(self._grid.push_messages([sent])), None) or None  # none of a run that is over

    def answers(self, asked: list[str]) -> Iterable[tuple[str, dict[str, Any] | str]]:
        for reply in self._grid.pull_messages(asked):
            said = str(reply.error.reason) if reply.has_error() else dict(reply.content["flexp"])
            yield reply.metadata.reply_to_message_id, said


def _take_part(message: Message, context: Context) -> Message:
    start, node = message.content["flexp"], dict(context.node_config)
    if "name" in node:
        node = {"state": "flexp-clients", **node}
        known = "data" in node
    elif known := "partition-id" in node:
        names = json.loads(str(start["content"]))["deployment"]["clients"]
        node["name"] = names[int(node["partition-id"])]
        if "state" not in node:
            node["state"] = str(Path(str(context.run_config["state"])) / "clients")
    if not known:
        raise ConfigError('this node names no data: --node-config \'name="NAME" data="/path/to/its/file"\'')
    return Message(RecordDict({"flexp": ConfigRecord(take_part(start, node))}), reply_to=message)
