"""Nucleus sampling: the likeliest tokens alone are drawn from."""

from torch import Tensor


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """``logits`` with −inf where a token is outside of its row's nucleus (Holtzman et al. 2020, arXiv 1904.09751).

    The nucleus is the smallest set of likeliest tokens whose probabilities come to at least ``top_p``; the likeliest
    one is always in it. Of equally likely tokens at its edge the sort says which are in. ``softmax`` of the result is
    what is sampled from, ``log_softmax`` its log-probs: the nucleus alone, scaled to 1.

    Args:
        logits: [n, V] floating point, after the temperature.
        top_p: in (0, 1].

    Returns:
        [n, V], the same dtype.

    Raises:
        ValueError: a ``top_p`` outside of (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    ascending, order = logits.sort(dim=-1)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p  # this token and all less likely ones can be done without
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
