"""FlexP on NVIDIA FLARE's collaborative API (2.9; ``pip install nvflare``): FLARE knows the sites and their identities,
delivers the job, starts, aborts and keeps logs; all else is :mod:`flexp.carried`'s. See docs/how-to/flower.md.

A client is named as its site. What is the site's own stands in ``local/flexp.json`` of its workspace: ``data``, ``cut``
and ``state``, as a Flower node's; without it the site reads what the run's ``[data]`` says, and saves in its workspace.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from nvflare.collab import CollabRecipe, collab

from flexp.carried import DAYS, Nodes, conduct, take_part
from flexp.config.loading import overridden
from flexp.errors import StoppedError

OWN = "flexp.json"


def recipe(
    config: Path, *, listen: str = "127.0.0.1:0", host: str = "", state: str = "flexp-state", job: str = "flexp"
) -> CollabRecipe:
    """The job of a ``CONFIG.toml``, which names its clients (``deployment.clients``) as FLARE names its sites: for
    ``execute`` in a simulation (``SimEnv``), a trial (``PocEnv``) or a federation (``ProdEnv``).

    Args:
        listen, host, state: as :func:`flexp.carried.conduct` has them.
    """
    content = overridden(config, ())
    server = Conducts(json.dumps(content), listen, host, state)
    clients = len(content.get("deployment", {}).get("clients") or [0])
    return CollabRecipe(job_name=job, server=server, client=TakesPart(), min_clients=clients, sync_task_timeout=120)


class Sites(Nodes):
    """FLARE's, as proxies. Looked at by the thread that conducts, which alone knows whether the job was aborted."""

    def __init__(self, start: dict[str, Any]) -> None:
        super().__init__(start)
        self._proxies = {proxy.name: proxy for proxy in collab.clients}
        self._answers = dict[str, Future[Any]]()

    def there(self) -> Iterable[Any]:
        if collab.is_aborted:
            raise StoppedError("the job was aborted")
        return self._proxies

    def send(self, node: Any) -> str | None:
        key = f"{node} {len(self._answers)}"
        call = self._proxies[node](timeout=DAYS * 86400.0)
        answer = self._answers[key] = Future[Any]()

        def ask() -> None:
            try:
                answer.set_result(call.take_part(self.start))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()  # whoever never answers keeps no process alive
        return key

    def answers(self, asked: list[str]) -> Iterable[tuple[str, dict[str, Any] | str]]:
        for key in asked:
            if (answer := self._answers[key]).done():
                error = answer.exception()
                yield key, str(error) if error is not None else dict(answer.result())


class Conducts:
    """The server's part of the job."""

    def __init__(self, content: str, listen: str, host: str, state: str) -> None:
        self.content, self.listen, self.host, self.state = content, listen, host, state

    def run(self) -> None:
        """Conduct the run."""
        options = {"listen": self.listen, "host": self.host, "state": self.state}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "flexp.json")
            file.write_text(self.content, encoding="utf-8")
            conduct(Sites, options, file)

    run = collab.main(run)


class TakesPart:
    """A site's part of the job."""

    def take_part(self, start: dict[str, Any]) -> dict[str, Any]:
        """Be a client; gives what to tell of it."""
        here = Path(collab.workspace.get_root_dir())
        own = Path(collab.workspace.get_site_config_dir(), OWN)
        node = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
        return take_part(start, {"state": here / "flexp-clients", **node, "name": collab.site_name})

    take_part = collab.publish(take_part)
