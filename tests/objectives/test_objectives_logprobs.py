"""Tiled log-probs and entropies against log_softmax of the full logits, and against finite differences."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vapo_async.objectives import logprobs
from vapo_async.objectives.logprobs import tile_shape, token_log_probs
from vapo_async.objectives.logprobs_liger import liger_log_probs, liger_takes

torch.set_num_threads(1)

Pair = tuple[Tensor, Tensor]


def inputs(n: int, h: int, v: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, h), (v, h), (v,))
    hidden, weight, bias = (
        (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes
    )
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None = None) -> Pair:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def gradients(pair: Pair, leaves: Sequence[Tensor], log_prob: bool = True, entropy: bool = True) -> tuple[Tensor, ...]:
    """Of a different multiple of every token's numbers."""
    weights = torch.linspace(-1, 2, len(pair[0]), dtype=pair[0].dtype, device=pair[0].device)
    terms = [(weights * pair[0]).sum()] * log_prob + [(weights.flip(0) * pair[1]).sum()] * entropy
    return torch.autograd.grad(torch.stack(terms).sum(), leaves)


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few columns: the softmax runs over many of them."""
    monkeypatch.setattr(logprobs, "TILE_COLUMNS", 3)


def test_hand_computed() -> None:
    """Logits (log 6, log 3, log 1) · 2 at temperature 2: probabilities 0.6, 0.3, 0.1."""
    weight = 2 * torch.tensor([[6.0], [3.0], [1.0]]).log()
    log_prob, entropy = token_log_probs(torch.ones(2, 1), weight, torch.tensor([1, 2]), 2.0)
    torch.testing.assert_close(log_prob.exp(), torch.tensor([0.3, 0.1]))
    expected = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    torch.testing.assert_close(entropy, torch.tensor([expected] * 2))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 23),
    chunk=st.none() | st.integers(1, 10),
    columns=st.integers(1, 24),
    temperature=st.floats(0.1, 5),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    with_bias=st.booleans(),
)
def test_equals_the_plain_way_under_any_tiling(
    n: int, v: int, chunk: int | None, columns: int, temperature: float, scale: float, with_bias: bool
) -> None:
    hidden, weight, bias, targets = inputs(n, 5, v, torch.float64, scale)
    used = bias if with_bias else None
    leaves = [hidden, weight] + [bias] * with_bias
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "TILE_COLUMNS", columns)
        got = token_log_probs(hidden, weight, targets, temperature, chunk, used)
        got_grads = gradients(got, leaves)
    expected = plain(hidden, weight, targets, temperature, used)
    for a, b in zip([*got, *got_grads], [*expected, *gradients(expected, leaves)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.detach().abs().max())))


@given(n=st.integers(0, 10_000), v=st.integers(1, 200_000), logits=st.integers(1, 1 << 24))
def test_tiles_fit_and_are_one_where_all_logits_do(n: int, v: int, logits: int) -> None:
    rows, columns = tile_shape(n, v, logits)
    assert rows >= 1 and columns >= 1 and rows * columns <= logits
    if 0 < n * v <= logits:
        assert (rows, columns) == (n, v)


def test_tile_of_a_large_vocabulary() -> None:
    assert tile_shape(4096, 151_936, 1 << 22) == (2048, 2048)
    assert tile_shape(100, 151_936, 1 << 22) == (100, 41_943)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.usefixtures("narrow_tiles")
def test_gradcheck(chunk: int | None) -> None:
    hidden, weight, bias, targets = inputs(7, 4, 8, torch.float64)
    check: Callable[..., Pair] = lambda h, w, b: token_log_probs(h, w, targets, 1.3, chunk, b)  # noqa: E731
    assert torch.autograd.gradcheck(check, (hidden, weight, bias))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("wanted", ["log_prob", "entropy"])
@pytest.mark.usefixtures("narrow_tiles")
def test_one_upstream_gradient_alone(chunk: int | None, wanted: str) -> None:
    hidden, weight, bias, targets = inputs(6, 4, 10, torch.float64)
    only = {"log_prob": wanted == "log_prob", "entropy": wanted == "entropy"}
    got = gradients(token_log_probs(hidden, weight, targets, 0.7, chunk, bias), (hidden, weight, bias), **only)
    expected = gradients(plain(hidden, weight, targets, 0.7, bias), (hidden, weight, bias), **only)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_asked_gradients_are_made_and_backward_may_run_twice() -> None:
    hidden, weight, bias, targets = inputs(6, 4, 10, torch.float64)
    log_prob, entropy = token_log_probs(hidden.detach(), weight, targets, 1.0, None, bias.detach())
    total = (log_prob + entropy).sum()
    first = torch.autograd.grad(total, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weight)[0]), "what was kept must not be written to"
    with torch.no_grad():
        without = token_log_probs(hidden, weight, targets, 1.0, None, bias)
    assert torch.equal(without[0], log_prob) and not without[0].requires_grad


class LargestTensor(TorchDispatchMode):
    """Entries of the largest result of any operation."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("columns", [2048, 50])
def test_never_holds_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(logprobs, "TILE_COLUMNS", columns)
    hidden, weight, _, targets = inputs(100, 2, 500, torch.float32)
    with LargestTensor() as seen:
        gradients(plain(hidden, weight, targets, 0.9), (hidden, weight))
    assert seen.entries == 100 * 500, "the probe must see what the plain way holds"
    with LargestTensor() as seen:
        gradients(token_log_probs(hidden, weight, targets, 0.9, 2), (hidden, weight))
    assert seen.entries <= 2 * 500
    monkeypatch.setattr(logprobs, "TILE_LOGITS", {"cpu": 2000})
    with LargestTensor() as seen:
        gradients(token_log_probs(hidden, weight, targets, 0.9), (hidden, weight))
    assert seen.entries <= 2000


def test_logits_of_one_tile_are_computed_once() -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ in ("addmm", "addmm_")
            return func(*args, **(kwargs or {}))

    hidden, weight, _, targets = inputs(10, 4, 50, torch.float32)
    for chunk, products in ((None, 3), (5, 2 * 4)):
        with Products() as seen:
            gradients(token_log_probs(hidden, weight, targets, 1.0, chunk), (hidden, weight))
        assert seen.count == products


@pytest.mark.usefixtures("narrow_tiles")
def test_large_logits_and_sure_tokens_keep_their_digits() -> None:
    """The plain way in float64 is the oracle; −Σ p log p from raw logits would lose the entropy's digits."""
    hidden, weight, _, targets = inputs(8, 4, 40, torch.float32, scale=30.0)
    weight = (weight.detach() + 100).requires_grad_()
    got = token_log_probs(hidden, weight, targets, 1.0, 3)
    logits = torch.nn.functional.linear(hidden, weight)
    log_p = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(got[0].double(), log_p.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(got[1].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in gradients(got, (hidden, weight)))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.usefixtures("narrow_tiles")
def test_bfloat16_keeps_float32_softmax_and_sums(chunk: int | None) -> None:
    hidden, weight, bias, targets = inputs(64, 8, 20, torch.bfloat16)
    got = token_log_probs(hidden, weight, targets, 0.8, chunk, bias)
    assert got[0].dtype == got[1].dtype == torch.float32
    expected = plain(hidden, weight, targets, 0.8, bias)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads = gradients(got, (hidden, weight, bias))
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    for a, b in zip(grads, gradients(plain(*exact[:2], targets, 0.8, exact[2]), exact), strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.usefixtures("narrow_tiles")
def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_inputs(chunk: int | None) -> None:
    hidden, weight, bias, targets = inputs(12, 8, 20, torch.float32)
    rounded = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_log_probs(rounded, weight, targets, 0.8, chunk, bias)
        expected = plain(rounded, weight, targets, 0.8, bias)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    got_grads = gradients(got, (rounded, weight, bias))
    assert [grad.dtype for grad in got_grads] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(got_grads, gradients(expected, (rounded, weight, bias)), strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()


def test_no_tokens() -> None:
    hidden, weight, _, targets = inputs(0, 4, 5, torch.float32)
    log_prob, entropy = token_log_probs(hidden, weight, targets, 1.0, 2)
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.shape == entropy.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()


def test_errors_name_what_is_wrong() -> None:
    hidden, weight, bias, targets = inputs(6, 4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"targets \[5\]"):
        token_log_probs(hidden, weight, targets[:5], 1.0)
    with pytest.raises(ValueError, match=r"weight \[5, 3\]"):
        token_log_probs(hidden, weight[:, :3], targets, 1.0)
    with pytest.raises(ValueError, match=r"bias \[4\]"):
        token_log_probs(hidden, weight, targets, 1.0, None, bias[:4])
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            token_log_probs(hidden, weight, targets, temperature)
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_log_probs(hidden, weight, targets, 1.0, 0)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=rf"\[0, 5\).*{wrong}"):
            token_log_probs(hidden, weight, torch.full((6,), wrong), 1.0)
    with pytest.raises(TypeError, match="int32"):
        token_log_probs(hidden, weight, targets.int(), 1.0)
    with pytest.raises(TypeError, match=r"hidden torch\.float32, weight torch\.bfloat16"):
        token_log_probs(hidden, weight.bfloat16(), targets, 1.0)


def test_liger_is_not_asked_without_its_gpu() -> None:
    hidden, weight, _, _ = inputs(6, 4, 5, torch.bfloat16)
    assert not liger_takes(hidden, weight, None)


def test_ligers_function_is_called_rightly() -> None:
    """Without its GPU Liger's function runs as plain torch: same arguments, signs and gradients per token."""
    pytest.importorskip("liger_kernel")
    hidden, weight, _, targets = inputs(9, 8, 20, torch.float32)
    got, expected = (f(hidden, weight, targets, 0.7) for f in (liger_log_probs, plain))
    for a, b in zip(
        [*got, *gradients(got, (hidden, weight))], [*expected, *gradients(expected, (hidden, weight))], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """With bfloat16 on a Hopper GPU this is Liger's kernel, if it is installed; otherwise the tiles."""
    hidden, weight, _, targets = inputs(300, 128, 5000, dtype, scale=0.5)
    on_gpu = [t.detach().cuda().requires_grad_() for t in (hidden, weight)]
    got = token_log_probs(on_gpu[0], on_gpu[1], targets.cuda(), 0.8, 50)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = plain(exact[0], exact[1], targets, 0.8)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip([*got, *gradients(got, on_gpu)], [*expected, *gradients(expected, exact)], strict=True):
        assert (a.cpu() - b).abs().max() < tolerance * b.abs().max()
