"""One publication waits; the newest wins; unchanged weights never hide changed ones."""

import pytest
import torch
from conftest import tiny_policy

from vapo_async.weights.mailbox import Mailbox, published_tensors


def test_the_newest_publication_is_taken_once() -> None:
    mailbox = Mailbox()
    assert mailbox.pull() is None
    mailbox.publish(1, {"w": torch.ones(1)})
    mailbox.publish(2, {"w": torch.zeros(1)})
    version, tensors = mailbox.pull() or (0, None)
    assert version == 2
    assert tensors is not None
    assert float(tensors["w"]) == 0
    assert mailbox.pull() is None


def test_a_version_without_new_weights_keeps_those_that_nobody_took() -> None:
    mailbox = Mailbox()
    mailbox.publish(1, None)
    assert mailbox.pull() == (1, None)
    weights = {"w": torch.ones(1)}
    mailbox.publish(2, weights)
    mailbox.publish(3, None)
    assert mailbox.pull() == (3, weights)


def test_versions_only_grow() -> None:
    mailbox = Mailbox()
    mailbox.publish(2, None)
    with pytest.raises(ValueError, match="version 2 published after version 2"):
        mailbox.publish(2, None)


@pytest.mark.parametrize("tied", [True, False])
def test_published_tensors_are_copies_tied_ones_once(tied: bool) -> None:
    policy = tiny_policy(18, tied=tied)
    tensors = published_tensors(policy)
    assert ("lm_head.weight" in tensors) is not tied
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)
