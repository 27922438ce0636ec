"""The positive-example language-model loss per token."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_mask, check_rows, check_same_shape


def positive_nll(log_prob: Tensor, mask: Tensor, correct: Tensor) -> Tensor:
    """−log π_θ(a_t | s_t) on the tokens of correct responses, 0 elsewhere (VAPO, arXiv 2504.05118).

    Args:
        log_prob: [B, T], of the taken tokens, under π_θ.
        mask: [B, T] bool, the tokens of the response.
        correct: [B] bool, the verifier's verdict.

    Returns:
        [B, T]; to be summed and divided by the correct-response tokens of the global mini-batch.
    """
    check_same_shape(2, log_prob=log_prob, mask=mask)
    check_mask(mask)
    check_mask(correct)
    check_rows(mask.shape[0], correct=correct)
    return torch.where(mask & correct[:, None], -log_prob, 0.0)
