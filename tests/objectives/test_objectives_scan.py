"""The linear recurrence against a plain fp64 loop, its gradients, its cost, and the Triton kernel."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vapo_async.objectives.scan import BLOCK, ActionScan, reverse_scan

torch.set_num_threads(1)
NAN = float("nan")


def loop(x: Tensor, c: Tensor) -> Tensor:
    """The definition, in fp64."""
    x, c = x.double(), c.double().expand(x.shape)
    y = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.float64)
    for t in reversed(range(x.shape[1])):
        y[:, t] = x[:, t] + c[:, t] * y[:, t + 1]
    return y[:, :-1]


def coefficients(kind: str, rows: int, steps: int, generator: torch.Generator) -> Tensor:
    per_row = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
    if kind == "row":
        return per_row
    if kind == "long":
        return 1 - per_row / 1000
    per_step = torch.rand(rows, steps, dtype=torch.float64, generator=generator)
    return per_step if kind == "step" else (per_step > 0.1).double()


class Spy(TorchDispatchMode):
    """Counts operations and keeps the largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_three_steps_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    assert reverse_scan(x, torch.tensor([[0.5], [2.0]])).tolist() == [[3.0, 4.0, 4.0], [7.0, 3.0, 1.0]]
    per_step = torch.tensor([[10.0, 0.5, NAN], [0.0, 3.0, NAN]]).nan_to_num(9.0)  # the last one meets y = 0
    assert reverse_scan(x, per_step).tolist() == [[41.0, 4.0, 4.0], [1.0, 4.0, 1.0]]


SIZES = st.one_of(
    st.integers(1, 3 * BLOCK),
    st.sampled_from([BLOCK**2 - 1, BLOCK**2, BLOCK**2 + 1, BLOCK**3 - 1, BLOCK**3, BLOCK**3 + 1, BLOCK**4 + 1, 5000]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 4),
    SIZES,
    st.sampled_from(["row", "long", "step", "zero or one"]),
    st.integers(0, 1000),
)
def test_equals_the_loop(rows: int, steps: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, steps, dtype=torch.float64, generator=generator)
    c = coefficients(kind, rows, steps, generator)
    kept = x.clone(), c.clone()
    torch.testing.assert_close(reverse_scan(x, c), loop(x, c), rtol=1e-11, atol=1e-11)
    assert torch.equal(x, kept[0]) and torch.equal(c, kept[1])
    got = reverse_scan(x.float(), c)
    assert got.dtype == torch.float32
    expected = loop(x, c)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, BLOCK, BLOCK + 1, 100, 1000])
def test_coefficients_zero_and_one_are_exact(steps: int) -> None:
    x = torch.arange(1.0, 2 * steps + 1).reshape(2, steps)
    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    for c in (zero, zero.expand(2, steps)):
        assert torch.equal(reverse_scan(x, c), x)
    for c in (one, one.expand(2, steps)):
        assert torch.equal(reverse_scan(x, c), x.flip(1).cumsum(1).flip(1))


def test_strided_input() -> None:
    x, c = torch.randn(40, 3).double().t(), torch.rand(40, 3).double().t()
    torch.testing.assert_close(reverse_scan(x, c), loop(x, c))
    torch.testing.assert_close(reverse_scan(x[:, ::2], c[:, ::2]), loop(x[:, ::2], c[:, ::2]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    assert reverse_scan(torch.zeros(shape), torch.zeros(shape[0], 1)).shape == shape


@pytest.mark.parametrize("steps", [1, 3, 2 * BLOCK, BLOCK**2 + 3])
@pytest.mark.parametrize("kind", ["row", "step", "zero or one"])
def test_gradients(steps: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, steps, dtype=torch.float64, generator=generator, requires_grad=True)
    c = coefficients(kind, 2, steps, generator)
    assert torch.autograd.gradcheck(lambda x: reverse_scan(x, c), x)
    assert torch.autograd.gradgradcheck(lambda x: reverse_scan(x, c), x)


def test_no_gradient_flows_into_the_coefficient() -> None:
    x, c = torch.ones(1, 3, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    reverse_scan(x, c).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0]]
    assert c.grad is None


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"x \[2, 3\], coefficient \[2\]"):
        reverse_scan(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"x \[2, 3\], coefficient \[2, 2\]"):
        reverse_scan(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"x \[3\], coefficient \[3\]"):
        reverse_scan(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("per_step", [False, True])
def test_work_and_memory_grow_with_the_length_alone(per_step: bool) -> None:
    """Neither a loop over tokens nor a table of T × T entries, forwards and backwards."""
    calls = {}
    for steps in (4096, 32768):
        x = torch.zeros(2, steps, dtype=torch.float64, requires_grad=True)
        c = torch.full((2, steps if per_step else 1), 0.5, dtype=torch.float64)
        with Spy() as spy:
            reverse_scan(x, c).sum().backward()
        calls[steps] = spy.calls
        assert spy.largest <= x.numel() + 2 * BLOCK
    assert calls[4096] < calls[32768] < calls[4096] + 20 * BLOCK


def test_half_a_million_steps_in_closed_form() -> None:
    steps, c = 500_000, 1 - 1e-6
    got = reverse_scan(torch.ones(1, steps, dtype=torch.float64), torch.full((1, 1), c, dtype=torch.float64))
    left = torch.arange(steps, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(got[0], (1 - c**left) / (1 - c), rtol=1e-9, atol=0)


def test_actions_by_hand() -> None:
    """Two trajectories in a row with a hole in each, padding around them."""
    mask = torch.tensor([[False, True, False, True, True, False, True, False]])
    ends = torch.tensor([[False, False, False, True, False, False, True, False]])
    x = torch.tensor([[NAN, 1.0, NAN, 2.0, 4.0, NAN, 8.0, NAN]], dtype=torch.float64)
    factor = torch.tensor([[0.5]], dtype=torch.float64)
    scan = ActionScan(mask, ends)
    assert scan.sums(x, factor)[mask].tolist() == [2.0, 2.0, 8.0, 8.0]
    assert scan.following(x).where(mask, 0).tolist() == [[0, 2, 0, 0, 8, 0, 0, 0]]
    one = ActionScan(mask, None)
    assert one.sums(x, factor)[mask].tolist() == [4.0, 6.0, 8.0, 8.0]
    assert one.following(x).where(mask, 0).tolist() == [[0, 2, 0, 4, 8, 0, 0, 0]]
    cut_in_a_hole = torch.tensor([[False, False, True, False, False, False, False, False]])
    assert ActionScan(mask, cut_in_a_hole).following(x).where(mask, 0).tolist() == [[0, 0, 0, 4, 8, 0, 0, 0]]


KERNEL = """
import torch
from vapo_async.objectives.scan import reverse_scan
from vapo_async.objectives.scan_triton import BLOCK, scan_rows

torch.manual_seed(0)
cpu = torch.device("cpu")
for rows, steps in ((2, 1), (3, 5), (1, BLOCK), (2, BLOCK + 1), (2, 2 * BLOCK + 3), (0, 4), (2, 0)):
    x = torch.randn(rows, steps, dtype=torch.float64)
    holes = torch.where(torch.rand(rows, steps) > 0.1, 0.99, 0.0).double()
    for c in (torch.rand(rows, 1).double(), torch.rand(rows, steps).double(), holes, torch.ones(rows, 1).double()):
        expected = reverse_scan(x, c)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            got = scan_rows(x.to(DEVICE, dtype), c.to(DEVICE, dtype))
            assert got.dtype == dtype and got.shape == x.shape
            torch.testing.assert_close(got.to(cpu, torch.float64), expected, rtol=tolerance, atol=tolerance * BLOCK)
print("passed")
"""


def run_kernel(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"DEVICE = {device!r}\n{KERNEL}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.endswith("passed\n"), done.stderr


def test_triton_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_kernel("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu() -> None:
    pytest.importorskip("triton")
    run_kernel("cuda")


@pytest.mark.gpu
def test_gradients_on_a_gpu_equal_those_on_the_cpu() -> None:
    x, c = torch.randn(3, 3000, dtype=torch.float64), torch.rand(3, 3000, dtype=torch.float64)
    grads = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = reverse_scan(leaf, c.to(device))
        (grad,) = torch.autograd.grad(y.square().sum(), leaf)
        grads.append((y.detach().cpu(), grad.cpu()))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-11)
