"""A run whose clients somebody else's control plane starts: Flower's (``flexp.flower``) or NVIDIA FLARE's
(``flexp.flare``), which knows the nodes, delivers the code, starts, stops, and keeps logs.

The run goes over FlexP's own link, with its conductors, snapshots and steps that count once. What starts a client
carries the server's address, and a token and a certificate that are made anew for each run; data, cut and state are the
node's own.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexp.config import DeploymentConfig
from flexp.config.loading import OTHERS, overridden, validate
from flexp.door import Door, Held
from flexp.errors import ConfigError
from flexp.files import folder_name

if TYPE_CHECKING:
    from flexp.links.base import Link

RESTARTS = 3
"""Times that the client of a node is started again."""
DAYS = 365
"""That a run may last: so long its certificate and its messages are valid."""
WHERE = "the configuration of the run"


def say(line: str) -> None:
    """To the control plane's log of the run."""
    print(f"flexp: {line}", flush=True)


class Nodes:
    """Starts every node's client, also of those that come late, again where it fell, and hears what it ended with.
    How the control plane is asked, a subclass says.

    Args:
        start: what a client is started with.

    Attributes:
        told: what each client said at its end.
    """

    def __init__(self, start: dict[str, Any]) -> None:
        self.start, self.told = start, dict[str, dict[str, Any]]()
        self._starts: Counter[Any] = Counter()
        self._asked: dict[str, Any] = {}

    def there(self) -> Iterable[Any]:
        """The nodes that are there now."""
        raise NotImplementedError

    def send(self, node: Any) -> str | None:
        """Start a node's client; gives by what its answer is known."""
        raise NotImplementedError

    def answers(self, asked: list[str]) -> Iterable[tuple[str, dict[str, Any] | str]]:
        """What has been answered since: what a client ended with, or why it fell."""
        raise NotImplementedError

    def look(self) -> bool:
        """See who is new, and who has answered; gives whether somebody has not."""
        for node in sorted(set(self.there()) - self._starts.keys()):
            self._start(node)
        for key, said in self.answers(list(self._asked)):
            node = self._asked.pop(key, None)
            if node is not None and isinstance(said, str):
                say(f"node {node}: {said}")
                if self._starts[node] <= RESTARTS:
                    self._start(node)
            elif isinstance(said, dict):
                self.told[str(said.pop("name", node))] = said
        return bool(self._asked)

    def _start(self, node: Any) -> None:
        self._starts[node] += 1
        if (key := self.send(node)) is not None:
            self._asked[key] = node


def conduct(
    nodes_of: Callable[[dict[str, Any]], Nodes],
    options: Mapping[str, str],
    file: Path,
    at_exit: Callable[[Callable[[], None]], object] = lambda _: None,
) -> None:
    """Serve the run of a ``CONFIG.toml``, which names its clients, until it is over or :meth:`Nodes.look` raises.

    Args:
        nodes_of: the control plane's nodes, by what their clients are started with.
        options: ``listen`` (HOST:PORT; port 0: any that is free), ``host`` (by which nodes reach it; empty: as in
            ``listen``) and ``state`` (the folder to save in, and to go on from).
        at_exit: is given what stops the run and waits for it, to call where the process is told to end.

    Raises:
        FlexpError: what is wrong with the configuration, the state or the address.
    """
    content = overridden(file, ())
    deployment = DeploymentConfig.checked(content.get("deployment", {}), str(file), "deployment")
    names = deployment.clients
    if deployment.blocks is not None or deployment.next is not None:
        raise ConfigError(f"{file}: here one server has all shared blocks; leave out deployment.blocks and next")
    if not names:
        raise ConfigError(f"{file}: has no deployment.clients; name the run's clients, as nodes do")
    host, _, port = options["listen"].rpartition(":")
    reached = options["host"] or host
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory() as folder, Held(host, int(port)) as held:  # clients start while blocks load
        certificate = certify(reached, Path(folder))
        address = f"grpcs://{reached}:{held.port}"
        nodes = nodes_of({"server": address, "token": token, "ca": certificate, "content": json.dumps(content)})
        nodes.look()
        stop, failed = threading.Event(), list[BaseException]()

        def serve() -> None:
            try:
                _serve(file, names, Path(options["state"]), token, Path(folder), held, stop)
            except BaseException as error:
                failed.append(error)
            finally:
                held.let_go()

        def end() -> None:
            stop.set()
            held.let_go()  # nobody need come any more
            if held.given:  # else there is nothing to save
                thread.join()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        at_exit(end)
        try:
            while thread.is_alive():
                nodes.look()
                thread.join(0.5)
            until = time.monotonic() + 30
            while nodes.look() and time.monotonic() < until:
                time.sleep(0.5)
        finally:
            end()
        for name in names:
            said = nodes.told.get(name, {"": "said nothing"})
            say(f"{name:20}" + "  ".join(f"{key} {value}".strip() for key, value in said.items()))
        if failed:
            raise failed[0]


def _serve(
    file: Path,
    names: list[str],
    state: Path,
    token: str,
    folder: Path,
    held: Held,
    stop: threading.Event,
) -> None:
    """Load the blocks and serve them at the address that is ``held``, with the certificate in ``folder``."""
    import torch

    from flexp.data.tasks import task_of
    from flexp.links.grpc import ServerTls, Tokens
    from flexp.links.rules import Limits
    from flexp.run.server import make_conductor, make_server, read_config, run_server

    config, deployment = read_config(file, ())
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    depth = 1 if config.model.base_depth is None else config.model.base_depth
    kind, rate = task_of(config.data).model_kind, deployment.bytes_per_second
    server = make_server(config, depth, deployment.end, kind, names, deployment=deployment)
    conductor = make_conductor(server, config, deployment, state, say)
    digest = hashlib.sha256(token.encode()).digest()
    run_server(
        server, held.address, say=say, stop=stop, conductor=conductor, ready=held.give,
        allow_export=deployment.allow_export, dismiss=deployment.on_stop == "leave",
        limits=Limits(
            max_tokens=deployment.max_tokens,
            requests_per_second=deployment.requests_per_second,
            bytes_per_second=math.inf if rate is None else rate,
        ),
        tls=ServerTls(folder / "cert.pem", folder / "key.pem"),
        tokens=Tokens(dict.fromkeys(names, digest)),
    )  # fmt: skip


def take_part(start: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Be a client until the run is over or stopped; gives what to tell of it.

    Args:
        start: what the server sent.
        node: what is the node's own: ``name``, ``state`` (a folder), and ``data`` (its file; else as the run's
            configuration says) and ``cut`` (S:E; likewise).

    Raises:
        FlexpError: what is wrong with the data, the state or the server's answers.
    """
    name, place = str(node["name"]), urlsplit(str(start["server"]))
    door = Door(str(place.hostname), int(place.port or 0))
    for heavy in ("torch", "transformers.modeling_utils", "flexp.run.client"):  # seconds, in which the run may end
        if door.gone():
            return {"name": name, "over": False}
        import_module(heavy)

    from flexp.cli.verify import parse_cut
    from flexp.links.grpc import connect
    from flexp.report.metrics import read
    from flexp.run.client import run_client
    from flexp.run.settle import settle_client

    content = json.loads(str(start["content"]))
    deployment = DeploymentConfig.checked(content.get("deployment", {}), WHERE, "deployment")
    if "data" in node:  # this node's own: nothing of it leaves
        data = content.setdefault("data", {})
        data["source"] = str(node["data"])
        data.setdefault("clients", {}).update(by="iid", count=1)
    config = validate({table: keys for table, keys in content.items() if table not in OTHERS}, WHERE)
    setup = settle_client(config, name, parse_cut(str(node["cut"])) if "cut" in node else None)
    for note in setup.run.federation.remarks:
        say(f"{name}: {note}")
    clients = setup.config.data.clients
    coded = "link" in content or any([clients.codec, *(one.codec for one in clients.each)])
    state = Path(str(node["state"])) / folder_name(name)
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as ca:
        ca.write(str(start["ca"]))
        ca.flush()
        known: dict[str, Any] = {"token": str(start["token"]), "ca": ca.name, "timeout": deployment.answer_seconds}

        def reach() -> Link:
            door.look()
            return connect(str(start["server"]), name, **known)

        over = run_client(
            setup, deployment, reach, state,
            codec=setup.config.link.codec if coded else None, stop=threading.Event(),
        )  # fmt: skip
    records, metric = read(state / "metrics.jsonl"), setup.run.federation.task.metric
    said: dict[str, Any] = {"name": name, "over": over}
    said["steps"] = max((int(record["step"]) for record in records if record["kind"] == "step"), default=0)
    scores = [record["personal"][metric] for record in records if record["kind"] == "eval"]
    return said | ({metric: float(scores[-1])} if scores and scores[-1] is not None else {})


def certify(host: str, folder: Path) -> str:
    """Make a certificate for one host that signs itself, as ``cert.pem`` and ``key.pem``; gives the certificate."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "flexp")])
    try:
        known: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        known = x509.DNSName(host)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
    made = made.not_valid_after(now + timedelta(days=DAYS)).add_extension(x509.SubjectAlternativeName([known]), False)
    signed = made.add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256())
    pem: bytes = signed.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder.joinpath("cert.pem").write_bytes(pem)
    folder.joinpath("key.pem").write_bytes(secret)
    return pem.decode()
