"""Several sequences in one row without padding: every token sees its own sequence's past and nothing else.

Positions start again with each sequence, and attention is computed for each by itself, so nothing is spent on padding
or on pairs of tokens that must not see each other. (Transformers' own way with ``sdpa``, a mask over all pairs of the
row, takes longer than padding does.)
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "packed_sdpa"
"""Transformers' name for :func:`packed_attention`."""
NOT_PACKED = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What some models ask of their attention, and :func:`packed_attention` does not do."""


def enable_packing(model: PreTrainedModel) -> bool:
    """Gives ``model`` an attention that takes packed rows, where that works; everything else it computes as before.

    A few tokens are run packed, padded, and packed behind another neighbour, so the model is in evaluation mode, and
    where ranks share its parameters all of them call this. A copy of it takes packed rows too; saved, it is an
    ordinary model.

    Returns:
        Whether packed rows give what padded ones do. If not, the model is left as it was.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
        if model.config._attn_implementation == PACKED_ATTENTION and _keeps_sequences_apart(model):
            return True
    except (TypeError, ValueError):  # a model that takes no such attention, or asks more of it
        pass
    model.set_attn_implementation(before)
    return False


def pack(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """[n, T, ...] to [1, S, ...]: the first ``lengths[i]`` entries of each row i, one after another; S = Σ lengths."""
    if len(lengths) != len(values) or not all(1 <= length <= values.shape[1] for length in lengths):
        raise ValueError(f"expected {len(values)} lengths between 1 and {values.shape[1]}, got {list(lengths)}")
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])[None]


def unpack(values: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """The reverse of :func:`pack`, [1, S, ...] to [n, width, ...], with zeros behind each row's end."""
    rows = pad_sequence(list(values[0].split(list(lengths))), batch_first=True)
    return pad(rows, (*(0, 0) * (rows.ndim - 2), 0, width - rows.shape[1]))


def packed_hidden(backbone: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states [1, S, H] of ``tokens`` [n, T] int64, right-padded, without the padding.

    Args:
        backbone: a decoder whose model :func:`enable_packing` took.
        tokens: of the sequences.
        lengths: of each sequence, in [1, T].
    """
    device, longest = tokens.device, max(lengths)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    # A 4-D mask is passed on as it is. Nothing reads it; without one Transformers would make one over all pairs.
    no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    hidden: Tensor = backbone(
        input_ids=pack(tokens, lengths),
        attention_mask=no_mask,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state
    return hidden


def packed_hidden_before_masked(backbone: nn.Module, tokens: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Hidden states [M, H] of the position before each of the M True tokens of ``mask`` [n, T], row after row.

    The same as of padded rows, and in the same order, so that what follows does not know how the rows were held.

    Raises:
        ValueError: a sequence's first token is masked: what stands before it in a packed row is another sequence.
    """
    if bool(mask[:, 0].any()):
        raise ValueError(
            "nothing stands before a sequence's first token that could predict it: mask[:, 0] must be False"
        )
    return packed_hidden(backbone, tokens, lengths)[:, :-1][pack(mask, lengths)[:, 1:]]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, in Transformers' interface; rows that are not packed go to ``sdpa``.

    Args:
        module: the attention layer.
        query: [1, heads, S, D].
        key: [1, key heads, S, D]; ``value`` likewise.
        attention_mask: read only where rows are not packed.
        dropout: share of attention weights that is dropped.
        scaling: of the scores; None: 1 / √D.
        cu_seq_lens_q: [n + 1] int32, where the sequences start, and S; None: not packed.
        max_length_q: tokens of the longest sequence.
        kwargs: what else the model passes.

    Returns:
        [1, S, heads, D], and None for the attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    asked = [name for name in NOT_PACKED if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"packed rows have no attention with {', '.join(asked)}: use padded rows")
    grouped = query.shape[1] != key.shape[1]
    if _flash_takes(query, dropout):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, grouped)[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None, grouped: bool
) -> Tensor:
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    causal = (-1, 0)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=causal, enable_gqa=grouped)
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out


def _flash_takes(query: Tensor, dropout: float) -> bool:
    """Whether torch's flash attention over sequences of unequal length takes these: on a GPU since Ampere."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    size = query.shape[-1]
    if not (query.is_cuda and half and dropout == 0 and size % 8 == 0 and size <= 256):
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(query.device)[0] >= 8


@torch.no_grad()
def _keeps_sequences_apart(model: PreTrainedModel) -> bool:
    backbone = model.get_decoder()
    lengths = (7, 9)
    width = max(lengths)
    vocab_size = int(model.config.get_text_config().vocab_size)
    tokens = (torch.arange(2 * width, device=model.device) * 7919 % vocab_size).view(2, width)
    packed = packed_hidden(backbone, tokens, lengths)
    padded = pack(backbone(input_ids=tokens, use_cache=False).last_hidden_state, lengths)
    tokens[0] = (tokens[0] + 1) % vocab_size
    other = packed_hidden(backbone, tokens, lengths)
    alike = bool((packed - padded).abs().max() <= 0.05 * padded.abs().max())
    return alike and torch.equal(packed[:, lengths[0] :], other[:, lengths[0] :])
