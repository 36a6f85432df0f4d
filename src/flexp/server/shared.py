"""The shared blocks: one copy that every client's gradient trains, with each client's weights kept while it needs them.

An optimiser step while another request's graph is alive would corrupt that request's gradient. So every request holds
the *version* of the weights that it ran with: as long as a version is held, an update leaves its tensors alone and goes
on with copies of them (weight stashing). Nothing is copied when nothing is in flight.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flexp.config import OptimizerConfig, ServerConfig
from flexp.errors import LinkError, StorageError, TrainingError
from flexp.models.fingerprint import tensor_fingerprint
from flexp.models.stage import Stage
from flexp.optim import Updater
from flexp.server.checks import Bounds
from flexp.server.rules import Covered, Past, Quota, rule_of

CPU = torch.device("cpu")
Whole = Callable[[Mapping[str, Tensor]], float]


class SharedBlocks:
    """Blocks [s_min, e_max) with their optimiser and update rule.

    Update rules (``ServerConfig.update``):

    - ``every``: each completed client step is one optimiser step.
    - ``mean``: ``mean_over`` completed client steps are one optimiser step with, for every parameter, the mean of the
      gradients of those client steps that reached it, weighted by their items. A sum would make the learning rate grow
      with the number of clients. What is left at the end of a run, :meth:`flush` applies.
    - ``trimmed``: likewise, but of every number the ``trim`` largest and smallest are left out first, and the steps
      count alike.

    With ``noise`` steps count alike, are clipped one by one, and noise covers what an update adds up.

    A parameter that no gradient reached is left as it is, weight decay included.
    """

    def __init__(
        self,
        stage: Stage,
        config: ServerConfig,
        optimizer: OptimizerConfig,
        total_steps: int | None = None,
    ) -> None:
        self.stage = stage
        self.version = 0
        self.frozen = False
        self._config, self._total_steps = config, total_steps
        # What is refused by other clients' norms would tell of them.
        self.bounds = Bounds(config.guard.model_copy(update={"explode": None}) if config.noise else config.guard)
        if total_steps is not None and config.update != "every":
            total_steps = -(-total_steps // config.mean_over)
        self.updater = Updater(stage.trainable(), optimizer, total_steps)
        self._held: Counter[int] = Counter()
        self.stashed: dict[int, dict[str, nn.Parameter]] = {}
        self._gathered = rule_of(config)
        self._past = None if config.guard.similar is None else Past(config.guard.similar, config.guard.settle)
        self.quota: Quota | None = None
        self.skipped: Counter[str] = Counter()  # steps of clients that were answered and not applied
        self.peak_versions = 1
        self.broken = ""  # why these weights may be between two steps, so that nobody may have them any more
        self._parked = False  # in main memory, since its client is idle
        self._fingerprint: str | None = None

    def apart(self) -> SharedBlocks:
        """The same blocks with trained weights and an optimiser of their own, which begin as these are now. The model
        is made of the weights of whoever called :meth:`enter` last."""
        self._install({name: nn.Parameter(value.detach().clone()) for name, value in self.updater.parameters.items()})
        made = SharedBlocks(self.stage, self._config, self.updater.config, self._total_steps)
        if self.frozen:
            made.freeze()
        return made

    def enter(self) -> None:
        """Let the model be made of these weights until others enter; nothing may be computing."""
        self.come()
        self._install(self.updater.parameters)

    def come(self) -> None:
        """Have weights and optimiser where the blocks compute."""
        if self._parked:
            self.updater.move(lambda name: self.stage.place_of(self.stage.block_of(name)))
            self._parked = False

    def park(self) -> None:
        """Leave weights and optimiser in main memory until they are used; nothing may be in flight."""
        if not self._parked and self.stage.model.device.type != "cpu" and self.updater.parameters:
            self.updater.move(lambda _: CPU)
            self._parked = True

    @property
    def has_room(self) -> bool:
        """Whether one more forward may hold the current version: the next update's is within the bound then, too."""
        most = self._config.max_versions
        return most is None or self._held[self.version] > 0 or len(self._held) + 1 < most

    def version_for(self, own: Iterable[int]) -> int:
        """The version that a forward runs with: the current one or, where that would be one too many, the newest of its
        client's ``own``, which are held already."""
        return self.version if self.has_room else max(own, default=self.version)

    def hold(self, version: int) -> int:
        """Keep the weights of a version, which is the current one or held, until :meth:`release`."""
        self._held[version] += 1
        return version

    def release(self, version: int) -> None:
        """Let go of a version that was held once."""
        self._held[version] -= 1
        if self._held[version] <= 0:
            del self._held[version]
            self.stashed.pop(version, None)

    def freeze(self) -> None:
        """From now on leave the weights as they are; clients still get their gradients. Nothing may be in flight."""
        self.frozen = True
        for parameter in self.updater.parameters.values():
            parameter.requires_grad_(False)

    def parameters_of(self, version: int) -> dict[str, nn.Parameter]:
        """The trained parameters of a version that is current or held; none, if they are frozen."""
        if self.frozen:
            return {}
        return self.updater.parameters if version == self.version else self.stashed[version]

    @contextmanager
    def installed(self, version: int) -> Iterator[None]:
        """Let the blocks compute with the weights of ``version`` inside the ``with`` block."""
        if version == self.version:
            yield
            return
        self._install(self.stashed[version])
        try:
            yield
        finally:
            self._install(self.updater.parameters)

    def add(
        self,
        gradients: Mapping[str, Tensor],
        weight: float,
        norm: float | None = None,
        whole: Whole | None = None,
        client: str = "",
    ) -> bool:
        """Take the gradient of one completed client step; update the weights when the rule says so.

        Args:
            norm: of all of them, where it is known.
            whole: where it is not, and other servers have more of them: gives the norm of an update.

        Returns:
            Whether the weights were updated.
        """
        due = self.collect(gradients, weight, client)
        if due is not None:
            self.apply(due, norm if self.one_by_one else None, whole)
        return due is not None

    @property
    def one_by_one(self) -> bool:
        """Whether a client's step is an update, as it is."""
        return self._config.update == "every" and not self._config.noise

    @property
    def told(self) -> float | None:
        """What updates have told other clients of one, at most (:attr:`flexp.server.rules.Covered.told`); ``None``:
        nothing covers them."""
        return self._gathered.told if isinstance(self._gathered, Covered) else None

    def collect(self, gradients: Mapping[str, Tensor], weight: float, client: str = "") -> Mapping[str, Tensor] | None:
        """Take the gradient of one completed client step; what :meth:`apply` is to be given, when the rule says so."""
        if self.frozen or not self.updater.parameters:
            return None
        if self.one_by_one:
            return gradients
        self._gathered.add(gradients, weight, client)
        due = 1 if self._config.update == "every" else self._config.mean_over
        return self.gathered() if self._gathered.steps >= due else None

    def wanted(self, client: str, gradients: Mapping[str, Tensor]) -> bool:
        """Whether a client's completed step is to train the blocks, or only to be answered."""
        wanted = (self.quota is None or self.quota.take(client)) and (self._past is None or self._past.fits(gradients))
        self.skipped[client] += not wanted
        return wanted

    def gathered(self) -> Mapping[str, Tensor] | None:
        """What the steps come to that the rule has gathered, however few; then it has none."""
        if not self._gathered.steps:
            return None
        return {name: mean.to(self.updater.parameters[name].dtype) for name, mean in self._gathered.take().items()}

    def flush(self, whole: Whole | None = None) -> bool:
        """Update the weights with what the rule has gathered; ``whole`` as in :meth:`add`.

        Returns:
            Whether there was anything.
        """
        due = self.gathered()
        if due is not None:
            self.apply(due, None, whole)
        return due is not None

    @property
    def fingerprint(self) -> str:
        """A hash of the trained weights: 32 hexadecimal digits."""
        if self._fingerprint is None:
            found = [f"{name} {tensor_fingerprint(value)}" for name, value in sorted(self.updater.parameters.items())]
            self._fingerprint = hashlib.blake2b("\n".join(found).encode(), digest_size=16).hexdigest()
        return self._fingerprint

    @property
    def waiting(self) -> int:
        """Steps of clients that wait for an update."""
        return self._gathered.steps

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser, and what the ``mean`` rule has gathered; nothing may be in flight that matters.

        Raises:
            StorageError: they are broken.
        """
        if self.broken:
            raise StorageError(self.broken)
        flat = {f"weights/{name}": value.detach() for name, value in self.updater.parameters.items()}
        flat |= {f"optimizer/{name}": value for name, value in self.updater.state().items()}
        flat |= self._gathered.state()
        for extra in (self._past, self.quota):
            flat |= {} if extra is None else extra.state()
        skipped = {f"skipped/{name}": torch.tensor(count) for name, count in self.skipped.items() if count}
        return flat | skipped | {"version": torch.tensor(self.version)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; nothing may be in flight.

        Raises:
            StorageError: the state belongs to other blocks or another tuning.
        """
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
        for entry, value in state.items():
            kind, slash, name = entry.partition("/")
            if slash:
                parts.setdefault(kind, {})[name] = value
        self.load_weights(parts["weights"])
        self.updater.load(parts["optimizer"])
        others = {name: value for name, value in state.items() if not name.startswith(("weights/", "optimizer/"))}
        places = {name: value.device for name, value in self.updater.parameters.items()}
        here = {
            name: value.to(places.get(name.partition("/")[2], self.stage.model.device))
            for name, value in others.items()
        }
        for extra in (self._gathered, self._past, self.quota):
            if extra is not None:
                extra.load(here)
        self.skipped = Counter({name: int(count) for name, count in parts.get("skipped", {}).items()})
        self.version = int(state["version"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, as if by an update; nothing may be in flight.

        Raises:
            StorageError: they belong to other blocks or another tuning.
        """
        odd = sorted(weights.keys() ^ self.updater.parameters.keys())
        if odd:
            raise StorageError(
                f"the saved shared blocks are not this server's: {odd[0]} is on one side only; "
                "resume with the same model, cuts and tuning"
            )
        with torch.no_grad():
            for name, parameter in self.updater.parameters.items():
                parameter.copy_(weights[name])
        self.version += 1
        self._fingerprint = None

    def apply(self, gradients: Mapping[str, Tensor], norm: float | None = None, whole: Whole | None = None) -> None:
        """Update the weights; see :meth:`add`.

        Raises:
            LinkError: the optimiser failed on its way, for instance because memory ran out; the blocks are then broken.
        """
        if norm is None and whole is not None:
            norm = whole(gradients)
        if self._held[self.version] > 0:
            self._stash_current()
        elif self.version in self._held:
            del self._held[self.version]
        for name, gradient in gradients.items():
            self.updater.parameters[name].grad = gradient
        try:
            self.updater.step(norm)
        except TrainingError:
            raise  # nothing was applied
        except Exception as error:
            self.updater.forget()
            self.broken = (
                f"an update of the shared blocks was not finished ({type(error).__name__}: {error}), so their weights "
                "may be between two steps; start the server again, it goes on from what it has saved"
            )
            raise LinkError(self.broken) from error
        self.version += 1
        self._fingerprint = None

    def _stash_current(self) -> None:
        """Leave the current parameters to the requests that hold them, and go on with copies."""
        self.stashed[self.version] = dict(self.updater.parameters)
        copies = {name: nn.Parameter(value.detach().clone()) for name, value in self.updater.parameters.items()}
        self.updater.replace(copies)
        self._install(copies)
        self.peak_versions = max(self.peak_versions, len(self.stashed) + 1)

    def _install(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            self.stage.model.get_submodule(path)._parameters[leaf] = parameter
