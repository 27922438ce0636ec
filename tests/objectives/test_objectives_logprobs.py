"""Chunked log-probs and entropies against log_softmax of the full logits, and against finite differences."""

import pytest
import torch
from torch import Tensor

from vapo_async.objectives.logprobs import token_log_probs

torch.set_num_threads(1)


def inputs(n: int, h: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, h), (v, h), (v,))
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_full_log_softmax(chunk: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs(8, 5, 11, torch.float32)
    used = bias if with_bias else None
    got = token_log_probs(hidden, weight, targets, 0.7, chunk, used, whole_logits=0)
    full = (torch.nn.functional.linear(hidden, weight, used) / 0.7).log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0], torch.distributions.Categorical(logits=full).entropy()
    weights = torch.linspace(-1, 2, 8)
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    grads = [
        torch.autograd.grad((weights * lp).sum() + (weights.flip(0) * e).sum(), leaves) for lp, e in (got, expected)
    ]
    for a, b in zip([*got, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole_logits", [0, 1000])
def test_gradcheck(whole_logits: int) -> None:
    hidden, weight, bias, targets = inputs(7, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_log_probs(h, w, targets, 1.3, 3, b, whole_logits), (hidden, weight, bias)
    )


def test_never_holds_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = inputs(10, 4, 50, torch.float32)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.append(len(a[0])) or linear(*a))
    log_prob, _ = token_log_probs(hidden, weight, targets, 1.0, 4, whole_logits=0)
    log_prob.sum().backward()
    assert seen == [4, 4, 2] * 2
    seen.clear()
    log_prob, _ = token_log_probs(hidden, weight, targets, 1.0, 4)
    log_prob.sum().backward()
    assert seen == [10], "few logits go in one piece, computed once"


def test_bfloat16_keeps_float32_softmax_and_empty_input_works() -> None:
    hidden, weight, _, targets = inputs(6, 4, 5, torch.bfloat16)
    log_prob, entropy = token_log_probs(hidden, weight, targets, 1.0, 2, whole_logits=0)
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.dtype == entropy.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    empty, _ = token_log_probs(hidden[:0], weight, targets[:0], 1.0, 2)
    empty.sum().backward()
    assert empty.shape == (0,)


def test_errors_name_the_shapes() -> None:
    hidden, weight, bias, targets = inputs(6, 4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"targets \[5\]"):
        token_log_probs(hidden, weight, targets[:5], 1.0, 2)
    with pytest.raises(ValueError, match=r"weight \[5, 3\]"):
        token_log_probs(hidden, weight[:, :3], targets, 1.0, 2)
    with pytest.raises(ValueError, match=r"bias \[4\]"):
        token_log_probs(hidden, weight, targets, 1.0, 2, bias[:4])
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(hidden, weight, targets, 0.0, 2)
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_log_probs(hidden, weight, targets, 1.0, 0)
