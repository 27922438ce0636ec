"""Batches for the estimators' tests, TorchRL's estimator beside ours, and a loop that follows the definition."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives.value import GAE

from vapo_async.objectives import LengthAdaptiveGAE

EXACT = {"rtol": 0.0, "atol": 1e-10}
NAN = math.nan
OUT = ("advantage", "value_target")


def f64(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def torchrl_gae(gamma: float, lmbda: float, **kwargs: Any) -> GAE:
    """The loop: the vectorised form crashes at λ = 0; and factors in float64, as a float is rounded to float32."""
    return GAE(gamma=f64(gamma), lmbda=f64(lmbda), **{"value_network": None, "vectorized": False, **kwargs})


def fixed(gamma: float, lmbda: float, **kwargs: Any) -> LengthAdaptiveGAE:
    return LengthAdaptiveGAE(gamma, lmbda=lmbda, lmbda_critic=lmbda, **kwargs)


def trajectories(
    batch: tuple[int, ...], steps: int, features: tuple[int, ...] = (1,), ends: str = "random"
) -> TensorDict:
    """A batch [*batch, T] with entries [*batch, T, *features], as in TorchRL's own tests of its estimators."""
    g = torch.Generator().manual_seed(steps + 7 * len(batch))
    shape = (*batch, steps, *features)
    at = len(batch)
    done = torch.zeros(shape, dtype=torch.bool)
    terminated = done.clone()
    if ends == "random":
        terminated = torch.rand(shape, generator=g) < 0.1
        done = terminated.clone()
    elif ends == "mixed":
        terminated = torch.rand(shape, generator=g) < 0.1
        done = terminated | (torch.rand(shape, generator=g) < 0.1)
    elif ends == "last":
        done.select(at, steps - 1).fill_(True)
        terminated = done.clone()
    elif ends == "truncated":
        done.select(at, steps - 1).fill_(True)

    def draw() -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    following = {"state_value": draw(), "reward": draw(), "done": done, "terminated": terminated}
    return TensorDict(
        {
            "state_value": draw(),
            "response_mask": torch.ones(*batch, steps, dtype=torch.bool),
            "next": TensorDict(following, [*batch, steps]),
        },
        [*batch, steps],
    )


def responses(lengths: tuple[int, ...] = (4, 7, 1), seed: int = 0, width: int | None = None) -> TensorDict:
    """Right-padded responses, each ending with done, the second truncated; NaN in the padding."""
    g = torch.Generator().manual_seed(seed)
    rows, steps = len(lengths), width or max(lengths)
    count = torch.tensor(lengths).unsqueeze(1)
    mask = torch.arange(steps) < count
    done = (torch.arange(steps) == count - 1).unsqueeze(-1)
    terminated = done.clone()
    terminated[1 % rows] = rows == 1

    def draw() -> Tensor:
        return torch.randn(rows, steps, 1, generator=g, dtype=torch.float64).masked_fill(~mask.unsqueeze(-1), NAN)

    value, following = draw(), {"state_value": draw(), "reward": draw(), "done": done, "terminated": terminated}
    extra = {"prox_log_prob": draw().squeeze(-1), "sample_log_prob": draw().squeeze(-1)}
    return TensorDict({"state_value": value, "response_mask": mask, **extra, "next": following}, [rows])


def moved(data: TensorDict, places: Tensor, width: int) -> TensorDict:
    """The actions of each row at new places [B, T] (where the mask is), NaN elsewhere."""
    rows = len(data)

    def scatter(entry: Tensor) -> Tensor:
        fill = NAN if entry.is_floating_point() else False
        out = torch.full((rows, width, *entry.shape[2:]), fill, dtype=entry.dtype)
        for b, t in data["response_mask"].nonzero().tolist():
            out[b, places[b, t]] = entry[b, t]
        return out

    return data.apply(scatter, batch_size=[rows])


def gathered(data: TensorDict, key: str) -> Tensor:
    """What stands on the actions, in order, and a check that there is nothing but zeros elsewhere."""
    entry, mask = data[key], data["response_mask"]
    if entry.is_nested:
        entry, mask = entry.values(), mask.values()
    assert not entry[~mask].any()
    return entry[mask]


def jagged(data: TensorDict, keep: Tensor | None = None) -> TensorDict:
    """Rows cut to ``keep`` [B, T] bool (default: to the actions), as torch.jagged nested tensors."""
    keep = data["response_mask"] if keep is None else keep
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return data.apply(lambda x: torch.nested.nested_tensor_from_jagged(x[keep], offsets=offsets))


def networks(dtype: torch.dtype = torch.float64) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    torch.manual_seed(0)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(4, 5).to(dtype), in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="sample_log_prob",
        ),
    )
    return actor, TensorDictModule(nn.Linear(4, 1).to(dtype), in_keys=["observation"], out_keys=["state_value"])


def rollout(batch: tuple[int, ...] = (3,), steps: int = 6, ends: str = "mixed") -> TensorDict:
    """Observations instead of values."""
    data = trajectories(batch, steps, ends=ends).exclude("state_value", ("next", "state_value"))
    g = torch.Generator().manual_seed(5)
    observation = torch.randn(*batch, steps + 1, 4, generator=g, dtype=torch.float64)
    at = len(batch)
    data["observation"] = observation.narrow(at, 0, steps)
    data["next", "observation"] = observation.narrow(at, 1, steps)
    data["action"] = torch.randint(0, 5, (*batch, steps), generator=g)
    data["sample_log_prob"] = torch.randn(*batch, steps, generator=g, dtype=torch.float64) * 0.1 - 1.6
    return data


def naive(data: TensorDict, gamma: float, lmbda: Tensor, key: str = "advantage") -> TensorDict:
    """Advantages by their definition, one step after another, from the back; λ [B, T]. Batch [B], entries [B, T, 1]."""
    mask = data["response_mask"]
    out = torch.zeros(*mask.shape, 1, dtype=torch.float64)
    for b in range(len(mask)):
        after = 0.0
        for t in reversed(range(mask.shape[1])):
            if data["next", "done"][b, t]:
                after = 0.0
            if not mask[b, t]:
                continue
            bootstrap = 0.0 if data["next", "terminated"][b, t] else data["next", "state_value"][b, t].item()
            delta = data["next", "reward"][b, t].item() + gamma * bootstrap - data["state_value"][b, t].item()
            after = delta + gamma * lmbda[b, t].item() * after
            out[b, t] = after
    return TensorDict({key: out, "response_mask": mask}, [len(mask)])


@st.composite
def ragged_batches(draw: st.DrawFn) -> TensorDict:
    rows, steps = draw(st.integers(1, 4)), draw(st.integers(1, 9))

    def flags(likely: int) -> Tensor:
        bits = st.lists(st.integers(0, 9), min_size=rows * steps, max_size=rows * steps)
        return (torch.tensor(draw(bits)) < likely).reshape(rows, steps)

    mask = flags(draw(st.sampled_from([3, 7, 10])))
    mask[torch.arange(rows), torch.tensor([draw(st.integers(0, steps - 1)) for _ in range(rows)])] = True
    done = flags(draw(st.sampled_from([0, 2, 10])))
    terminated = flags(3) & (done if draw(st.booleans()) else torch.ones_like(done))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def floats() -> Tensor:
        x = torch.randn(rows, steps, 1, generator=g, dtype=torch.float64)
        return x.masked_fill(~mask.unsqueeze(-1), NAN)

    following = {
        "state_value": floats().masked_fill(terminated.unsqueeze(-1), NAN),  # never read
        "reward": floats(),
        "done": done.unsqueeze(-1),
        "terminated": terminated.unsqueeze(-1),
    }
    return TensorDict({"state_value": floats(), "response_mask": mask, "next": following}, [rows])


def lengths_of(data: TensorDict) -> Tensor:
    """Actions of the trajectory of each step, by a loop: a done after the last action still ends it."""
    mask, done = data["response_mask"], data["next", "done"].squeeze(-1)
    out = torch.zeros(mask.shape, dtype=torch.int64)
    for b in range(len(mask)):
        start = 0
        for t in range(mask.shape[1]):
            if done[b, t] or t == mask.shape[1] - 1:
                out[b, start : t + 1] = mask[b, start : t + 1].sum()
                start = t + 1
    return out
