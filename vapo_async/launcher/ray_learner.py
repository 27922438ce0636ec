"""The learner's processes. All ranks are asked the same; what they answer is rank 0's, or each one's share."""

import socket
from collections.abc import Iterator
from pathlib import Path

import ray
import torch
from tensordict import TensorDictBase
from torch import Tensor

from vapo_async.build import BaseModel, build_learner
from vapo_async.config import Config, DeepSpeedLearnerConfig, RunError
from vapo_async.launcher.ray_actors import WATCH, Watched
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.deepspeed_environment import prepare_deepspeed
from vapo_async.learner.learner import UpdateResult
from vapo_async.models.load import load_tokenizer
from vapo_async.weights.broadcast import Group, Layout
from vapo_async.weights.sender import Sender, build_sender
from vapo_async.weights.travel import Arrays, to_arrays

SEND = "send"
"""Concurrency group of broadcasts, which may hang, and of who asks for what they sent, in the order of the calls."""
LEARNER_GROUPS = {WATCH: 1, SEND: 1}


class LearnerActor(Watched):
    """One rank of the learner: policy, critic and their optimizers, or its part of them."""

    def __init__(self, config: Config, base: BaseModel, rank: int) -> None:
        torch.set_num_threads(config.learner.threads)
        if isinstance(config.learner, DeepSpeedLearnerConfig):
            prepare_deepspeed(config.learner.device)
        self._config, self._base, self._rank = config, base, rank
        self._tokenizer = load_tokenizer(base.tokenizer)
        self._held = socket.socket()
        self._sender: Sender | None = None
        self._sent: tuple[int, Arrays] | None = None  # a version, and this rank's share of it

    def meeting_point(self) -> tuple[str, int]:
        """A host and a port at which others can meet this process; until the next call nobody else is given it."""
        host = ray.util.get_node_ip_address()
        before, self._held = self._held, socket.socket()
        before.close()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does, which listens there
        self._held.bind((host, 0))
        return host, self._held.getsockname()[1]

    def build(self, meeting_point: tuple[str, int] | None) -> None:
        """Loads the models; several ranks meet at a point first, and all return together."""
        self._learner = build_learner(self._config, self._base, self._rank, meeting_point)

    def update(self, trajectories: list[TensorDictBase], version: int) -> UpdateResult:
        return self._learner.update(trajectories, version)

    @ray.method(num_returns=2)
    def weights(self) -> tuple[None, Arrays]:
        """This rank's share of the parameters: every n-th one, whole.

        Two references: the first one says that the second one is there, without fetching it.
        """
        return None, to_arrays(dict(self._share(self._learner.policy_backend.parameters())))

    def layout(self) -> Layout:
        """What a broadcast sends."""
        return Layout.of(self._learner.policy_backend.shapes, self._learner.policy.dtype)

    @ray.method(concurrency_group=SEND)
    def broadcast(self, version: int, group: Group | None, anew: bool) -> None:
        """Rank 0 sends the weights to the engines of a group, which is joined first if it is a new one.

        Each rank keeps a copy of its share for engines that come later, with which the next update does not interfere.

        Raises:
            RunError: somebody left, or did not come.
        """
        parameters = self._learner.policy_backend.parameters()
        if group is None or self._rank:
            self._sent = version, to_arrays(dict(self._share(parameters)))
            return
        if self._sender is None:
            self._sender = build_sender(self._config.learner.device, self.layout())
        kept: dict[str, Tensor] = {}
        try:
            if anew:
                self._sender.join(group)
            self._sender.send(self._keeping(parameters, kept))
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise RunError(f"the learner's broadcast to {', '.join(group.owners)} failed: {first}") from error
        finally:
            for _ in self._keeping(parameters, kept):  # the other ranks go through all of them too
                pass
            self._sent = version, to_arrays(kept)

    @ray.method(concurrency_group=SEND)
    def sent(self, version: int) -> Arrays:
        """This rank's share of a version, once its broadcast, which is the last one, has ended.

        Raises:
            RunError: the last one was of another version: an engine would get weights under a wrong name.
        """
        if self._sent is None or self._sent[0] != version:
            kept = "nothing" if self._sent is None else f"version {self._sent[0]}"
            raise RunError(f"the learner's rank {self._rank} was asked for version {version} and has kept {kept}")
        return self._sent[1]

    def save(self, folder: Path) -> None:
        save_learner(self._learner, self._tokenizer, folder)

    def load(self, folder: Path) -> None:
        load_learner(self._learner, folder)

    def _share(self, parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Copies on the CPU of every n-th one; what lies between is gathered with the other ranks all the same."""
        for i, (name, parameter) in enumerate(parameters):
            if i % self._learner.ranks.size == self._rank:
                yield name, parameter.to("cpu", copy=True)

    def _keeping(
        self, parameters: Iterator[tuple[str, Tensor]], kept: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """All of them, and copies of this rank's share into ``kept``."""
        own = list(self._learner.policy_backend.shapes)[self._rank :: self._learner.ranks.size]
        for name, parameter in parameters:
            if name in own:
                kept[name] = parameter.to("cpu", copy=True)
            yield name, parameter
