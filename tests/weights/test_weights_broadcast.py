"""Who takes part in a broadcast, and gloo's ends of it in processes of their own."""

import multiprocessing
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from conftest import tiny_policy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vapo_async.weights.broadcast import Broadcast, Group, Layout, fits, members
from vapo_async.weights.gloo import GlooSender, join

LOCAL = "127.0.0.1"


@given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=9), st.integers(1, 8))
def test_ranks_are_the_learners_and_then_each_engines(owners: set[str], ranks: int) -> None:
    group = Group("host", 1, members(owners), ranks)
    taken = [0] + [group.first_rank(owner) + i for owner in owners for i in range(ranks)]
    assert sorted(taken) == list(range(group.world_size))


def test_a_group_fits_its_members_in_any_order_and_nobody_else() -> None:
    group = Group("host", 1, members(["b", "a"]), 1)
    assert fits(group, ["a", "b"]) and fits(group, ["b", "a"])
    assert not fits(group, ["a"]) and not fits(group, ["a", "c"]) and not fits(group, ["a", "b", "c"])
    assert not fits(None, ["a"])
    with pytest.raises(ValueError, match="not in tuple"):
        group.first_rank("c")


@pytest.mark.parametrize("tied", [True, False])
def test_the_layout_is_what_is_sent(tied: bool) -> None:
    policy = tiny_policy(19, tied=tied).to(torch.bfloat16)
    sent = dict(policy.named_parameters())
    layout = Layout.of({name: p.shape for name, p in sent.items()}, policy.dtype)
    assert layout.names == list(sent)
    assert ("lm_head.weight" in layout.names) is not tied
    assert set(layout.dtypes) == {"bfloat16"}
    assert [tuple(shape) for shape in layout.shapes] == [tuple(p.shape) for p in sent.values()]
    part = Broadcast(Group("host", 5, ("a", "b"), 2), "b", layout)
    assert part.join() == {"host": "host", "port": 5, "first_rank": 3, "world_size": 5}
    assert part.update() == {"names": layout.names, "dtypes": layout.dtypes, "shapes": layout.shapes}


def _receive(port: int, rank: int, shapes: list[tuple[int, ...]], rounds: int, out: Connection) -> None:
    group = join(LOCAL, port, rank, 3)
    for _ in range(rounds):
        received = [torch.empty(shape) for shape in shapes]
        for tensor in received:
            group.broadcast(tensor, 0).wait()
        out.send([tensor.tolist() for tensor in received])


def parameters_of(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.detach()) for name, p in policy.named_parameters())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        port: int = probe.getsockname()[1]
        return port


class Receivers:
    """Two processes that take part in ``rounds`` broadcasts of a policy."""

    def __init__(self, policy: nn.Module, rounds: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.group = Group(LOCAL, _free_port(), ("a", "b"), 1)
        shapes = [tuple(parameter.shape) for parameter in policy.parameters()]
        self.outputs = []
        self.processes = []
        for rank in (1, 2):
            receiving, sending = context.Pipe(duplex=False)
            arguments = (self.group.port, rank, shapes, rounds, sending)
            self.processes.append(context.Process(target=_receive, args=arguments, daemon=True))
            self.outputs.append(receiving)
            self.processes[-1].start()

    def heard(self) -> list[list[Tensor]]:
        found = []
        for output in self.outputs:
            assert output.poll(60)
            found.append([torch.tensor(values) for values in output.recv()])
        return found


def test_everybody_gets_the_parameters_as_they_are_and_a_new_group_can_be_made() -> None:
    policy = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    policy[0].weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())  # not contiguous
    sender = GlooSender()
    for rounds in (2, 1):
        receivers = Receivers(policy, rounds)
        sender.join(receivers.group)
        for _ in range(rounds):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(1)
            sender.send(parameters_of(policy))
            for received in receivers.heard():
                assert all(torch.equal(a, b) for a, b in zip(received, policy.parameters(), strict=True))
        for process in receivers.processes:
            process.join(30)


def test_a_member_that_is_killed_ends_the_broadcast_for_all() -> None:
    policy = nn.Linear(2000, 500)
    receivers = Receivers(policy, rounds=1000)
    sender = GlooSender()
    sender.join(receivers.group)
    sender.send(parameters_of(policy))
    receivers.heard()
    receivers.processes[0].kill()
    receivers.processes[0].join()
    with pytest.raises(RuntimeError):
        for _ in range(50):
            sender.send(parameters_of(policy))
    receivers.processes[1].join(30)
    assert receivers.processes[1].exitcode not in (None, 0), "it does not wait for what will not come"
