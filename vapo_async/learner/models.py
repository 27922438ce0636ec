"""What the learner evaluates: per-token log-probs of the policy, per-token values of the critic.

Position convention: entry t of every [N, T] result belongs to token t and is computed from the tokens before it, so
``value[t]`` is V(s_t), read before action t. Entries outside the response mask are 0.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vapo_async.config import ConfigError
from vapo_async.learner.balance import DecoderCost
from vapo_async.learner.packed import packed_hidden_before_masked
from vapo_async.objectives.logprobs import token_log_probs


class Critic(nn.Module):
    """A backbone of its own and a zero-initialised scalar head (docs/methods.md)."""

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(hidden_size, 1, dtype=next(backbone.parameters()).dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def from_policy(cls, policy: PreTrainedModel) -> "Critic":
        """Starts from a copy of the policy's backbone."""
        return cls(copy.deepcopy(policy.get_decoder()), policy.config.get_text_config().hidden_size)

    @classmethod
    def from_decoder_of(cls, model: PreTrainedModel) -> "Critic":
        """Starts from the backbone itself of a model that has no other use."""
        return cls(model.get_decoder(), model.config.get_text_config().hidden_size)

    def forward(self, tokens: Tensor, mask: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Values [N, T] (float32) of ``tokens`` [N, T] int64, right-padded, at the True positions of ``mask``.

        ``lengths``: see :func:`policy_log_probs`.
        """
        hidden = _hidden_before_masked(self.backbone, tokens, mask, lengths)
        return _scatter(self.value_head(hidden)[:, 0].float(), mask)


class PolicyModel(nn.Module):
    """The policy as the learner calls it: one call for the log-probs, whoever holds the parameters.

    Args:
        policy: a causal language model.
        temperature: that the logits are divided by.
        chunk_tokens: see :func:`vapo_async.objectives.logprobs.token_log_probs`.
    """

    PREFIX = "policy."
    """Of its parameters' names; what follows are the language model's own."""

    def __init__(self, policy: PreTrainedModel, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.policy, self.temperature, self._chunk_tokens = policy, temperature, chunk_tokens

    def forward(self, tokens: Tensor, mask: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """See :func:`policy_log_probs`."""
        temperature, chunk_tokens = self.temperature, self._chunk_tokens
        return policy_log_probs(
            self.policy, tokens, mask, temperature=temperature, chunk_tokens=chunk_tokens, lengths=lengths
        )


def policy_log_probs(
    policy: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy, [N, T] float32 each, of ``tokens`` [N, T] under ``softmax(logits / temperature)``.

    ``lengths``: tokens of each row, of a model that takes rows without padding between them
    (:func:`vapo_async.learner.packed.enable_packing`); None pads.
    """
    hidden = _hidden_before_masked(policy.get_decoder(), tokens, mask, lengths)
    head = policy.get_output_embeddings()
    log_prob, entropy = token_log_probs(
        hidden, head.weight, tokens[mask], temperature=temperature, chunk_tokens=chunk_tokens, bias=head.bias
    )
    return _scatter(log_prob, mask), _scatter(entropy, mask)


def decoder_cost(policy: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> DecoderCost:
    """What a row costs. ``shapes``: of the whole parameters by name, whoever holds them."""
    text = policy.config.get_text_config()
    parameters = sum(shape.numel() for shape in shapes.values())
    taken: Any = policy.get_input_embeddings()
    given: Any = policy.get_output_embeddings()
    if given.weight is not taken.weight:
        parameters -= text.vocab_size * text.hidden_size
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderCost.of(
        parameters=parameters, layers=text.num_hidden_layers, attention_width=text.num_attention_heads * head
    )


@torch.no_grad()
def check_log_probs(model: PolicyModel) -> None:
    """Compares the log-probs with those of the language model's own logits on a few tokens.

    Raises:
        ConfigError: the model does more to its logits than multiply by the output embedding (a scale, a soft cap).
    """
    policy = model.policy
    vocab_size = policy.config.get_text_config().vocab_size
    tokens = torch.arange(8, device=policy.device)[None] * 7919 % vocab_size
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    ours, _ = model(tokens, mask)
    logits = policy(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    theirs = (logits / model.temperature).log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    gap = float((ours[0, 1:] - theirs).abs().max())
    rounding = 2 * torch.finfo(policy.dtype).eps * float(logits.abs().max())  # theirs have the model's dtype
    if gap > max(1e-2, rounding) / model.temperature:
        raise ConfigError(
            f"model {type(policy).__name__} changes its logits after the output embedding "
            f"(log-probs differ by {gap:.3g}): the learner cannot train it; use a model of the Qwen2 or Llama kind"
        )


def _hidden_before_masked(backbone: nn.Module, tokens: Tensor, mask: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Hidden states [M, H] of the position before each masked token.

    No padding mask is needed: padding is on the right, and causal attention never looks right.
    """
    if lengths is not None:
        return packed_hidden_before_masked(backbone, tokens, mask, lengths)
    hidden: Tensor = backbone(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden[:, :-1][mask[:, 1:]]


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(mask, values)
