"""The positive-example language-model loss per token."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_boolean, check_mask, check_rows, check_same_shape


def positive_nll(log_prob: Tensor, mask: Tensor, correct: Tensor) -> Tensor:
    """−log π_θ(a_t | s_t) on the tokens of correct responses, 0 elsewhere (VAPO, arXiv 2504.05118).

    Args:
        log_prob: [B, T], of the taken tokens, under π_θ.
        mask: [B, T] bool, the tokens of the response.
        correct: the verifier's verdict, bool, [B], or [B, T] where a row holds several responses.

    Returns:
        [B, T]; to be summed and divided by the correct-response tokens of the global mini-batch.
    """
    check_same_shape(2, log_prob=log_prob, mask=mask)
    return torch.where(positive_tokens(mask, correct), -log_prob, 0.0)


def positive_tokens(mask: Tensor, correct: Tensor) -> Tensor:
    """The tokens of correct responses, [B, T] bool: mask [B, T] bool, correct [B] or [B, T] bool."""
    check_mask(mask)
    check_boolean(correct=correct)
    if correct.ndim == 2:
        check_same_shape(mask=mask, correct=correct)
        return mask & correct
    check_rows(mask.shape[0], correct=correct)
    return mask & correct[:, None]
