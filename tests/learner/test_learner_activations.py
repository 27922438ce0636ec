"""Activation checkpointing: the same gradients from less memory, and no dropout."""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor, nn
from transformers import PreTrainedModel

from vapo_async.config import ConfigError
from vapo_async.learner.activations import checkpoint_activations
from vapo_async.learner.models import PolicyModel

VOCAB = 18


def saved_bytes(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What is kept for the backward pass, each storage once; and the result."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storages.values()), result


def gradients(policy: PreTrainedModel) -> tuple[int, dict[str, Tensor]]:
    model = PolicyModel(policy, temperature=1.0, chunk_tokens=64)
    tokens = torch.randint(0, VOCAB, (6, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :4] = False
    kept, loss = saved_bytes(lambda: model(tokens, mask)[0].sum())
    loss.backward()
    return kept, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gradients_are_the_same_and_less_is_kept(family: str) -> None:
    policy = tiny_policy(VOCAB, family=family).eval()
    plain, expected = gradients(policy)
    policy.zero_grad()
    checkpoint_activations(policy)
    less, found = gradients(policy)
    assert less < plain / 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_dropout_stays_off() -> None:
    policy = tiny_policy(VOCAB)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.9
    policy.eval()
    _, expected = gradients(policy)
    policy.zero_grad()
    checkpoint_activations(policy)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(policy)[1].items())


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation_checkpointing=true: Linear has no layers"):
        checkpoint_activations(nn.Linear(2, 2))
