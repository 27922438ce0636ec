"""Random rows to estimate advantages on, and TorchRL's own results for them."""

import torch
from hypothesis import strategies as st
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate, vtrace_advantage_estimate

NAN, INF = float("nan"), float("inf")
SHORT, LONG = st.integers(1, 30), st.sampled_from([511, 512, 513, 1000, 4097, 5000])
GAMMA = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def bits(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


class Problem:
    """Rows with padding on both sides, holes and several trajectories; garbage outside the mask."""

    def __init__(self, rows: int, steps: int, *, holes: float, cuts: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, dtype=torch.float64, generator=generator)

        place = torch.arange(steps)
        first, last = (uniform(2, rows, 1) * (steps + 1)).long().sort(0).values
        self.mask = (place >= first) & (place < last)
        if seed % 4 == 0:
            self.mask[0] = True
        self.mask &= uniform(rows, steps) >= holes
        self.ends = self.mask & (uniform(rows, steps) < cuts)
        garbage = torch.tensor([NAN, INF, -INF])[torch.randint(3, (3, rows, steps), generator=generator)]
        drawn = torch.randn(3, rows, steps, dtype=torch.float64, generator=generator)
        self.value, self.reward, self.log_ratio = torch.where(self.mask, drawn, garbage)
        self.terminated = uniform(rows, steps) < 0.5
        bootstrap = torch.randn(rows, steps, dtype=torch.float64, generator=generator)
        self.next_value = torch.where(self.mask, torch.where(self.terminated, 0.0, bootstrap), garbage[0])
        self.bootstrap = bootstrap
        self.lmbda = uniform(rows, 1)
        self.lmbda[0] = seed % 3 / 2
        self.step_lmbda = uniform(rows, steps)

    def torchrl(
        self, gamma: float, lmbda: Tensor, *, bootstrap: bool, cut: bool, vtrace: bool = False
    ) -> tuple[Tensor, Tensor]:
        """TorchRL's loops, row by row over the actions alone; λ [B, 1]. Advantage (or nothing) and value target."""
        advantage, target = torch.zeros(2, *self.mask.shape, dtype=torch.float64)
        for b, m in enumerate(self.mask):
            if not m.any():
                continue
            value, reward, log_ratio = (x[b, m][:, None] for x in (self.value, self.reward, self.log_ratio))
            done = self.ends[b, m][:, None].clone() if cut else torch.zeros(value.shape, dtype=torch.bool)
            done[-1] = True
            if bootstrap:
                next_value, terminated = self.bootstrap[b, m][:, None], self.terminated[b, m][:, None]
            else:
                next_value, terminated = torch.cat([value[1:], value.new_full((1, 1), 7.0)]), done
            factor = torch.tensor(gamma, dtype=torch.float64)  # Python floats would pass through float32
            if vtrace:
                zero = torch.zeros_like(log_ratio)
                caps = torch.tensor([1.2, 0.9], dtype=torch.float64)
                _, v = vtrace_advantage_estimate(
                    factor, log_ratio, zero, value, next_value, reward, done, terminated, *caps
                )
                target[b, m] = v[:, 0]
            else:
                got = generalized_advantage_estimate(factor, lmbda[b], value, next_value, reward, done, terminated)
                advantage[b, m], target[b, m] = got[0][:, 0], got[1][:, 0]
        return advantage, target

    def optional(self, bootstrap: bool, cut: bool) -> dict[str, Tensor]:
        return ({"next_value": self.next_value} if bootstrap else {}) | ({"ends": self.ends} if cut else {})


@st.composite
def problems(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> Problem:
    return Problem(
        draw(st.integers(1, 4)),
        draw(sizes),
        holes=draw(st.sampled_from([0.0, 0.2])),
        cuts=draw(st.sampled_from([0.0, 0.15])),
        seed=draw(st.integers(0, 10_000)),
    )


def same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
