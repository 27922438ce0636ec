"""VAPOLoss and LengthAdaptiveGAE where ClipPPOLoss and GAE would stand: a TorchRL actor-critic learns the pendulum.

Everything else is ordinary TorchRL. `python scripts/examples/torchrl_reuse.py [--seed 0]` takes half a minute.
"""

import argparse

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import BatchSizeTransform, Compose, PendulumEnv, RewardScaling, StepCounter, TransformedEnv
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator

from vapo_async.objectives import LengthAdaptiveGAE, VAPOLoss

BATCHES, ENVS, STEPS, MINIBATCHES, EPOCHS, SCALE = 24, 64, 200, 8, 5, 0.1

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)


def reset(_: TensorDictBase | None, __: TensorDictBase, env: TransformedEnv) -> TensorDictBase:
    return env.base_env.reset(env.base_env.gen_params(batch_size=[ENVS]), set_state=False)


def network(out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out))


batched = BatchSizeTransform(batch_size=[ENVS], reset_func=reset, env_kwarg=True)
env = TransformedEnv(PendulumEnv(seed=args.seed), Compose(batched, StepCounter(STEPS), RewardScaling(0.0, SCALE)))
observe = TensorDictModule(
    lambda th, thdot: torch.stack([th.sin(), th.cos(), thdot / 8], -1),
    in_keys=["th", "thdot"],
    out_keys=["observation"],
)
head = nn.Sequential(network(2), NormalParamExtractor())
actor = ProbabilisticActor(
    TensorDictSequential(observe, TensorDictModule(head, in_keys=["observation"], out_keys=["loc", "scale"])),
    in_keys=["loc", "scale"],
    spec=env.action_spec,
    distribution_class=TanhNormal,
    distribution_kwargs={"low": -2.0, "high": 2.0},
    return_log_prob=True,
)
critic = TensorDictSequential(observe, ValueOperator(network(1), in_keys=["observation"]))

advantages = LengthAdaptiveGAE(gamma=0.95, alpha=0.05, lmbda_critic=0.95, average_gae=True, value_network=critic)
advantages.set_keys(response_mask=None)  # every step is an action
loss = VAPOLoss(actor, critic, clip_epsilon=(0.2, 0.28), nll_coeff=None)  # no verdicts here, so no positive examples
loss.set_keys(response_mask=None)

optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
frames = ENVS * STEPS
buffer = ReplayBuffer(
    storage=LazyTensorStorage(frames), sampler=SamplerWithoutReplacement(), batch_size=frames // MINIBATCHES
)
returns = []
collector = Collector(
    env, actor, frames_per_batch=frames, total_frames=frames * BATCHES, auto_register_policy_transforms=False
)
for batch in collector:
    returns.append(float(batch["next", "reward"].sum(1).mean()) / SCALE)
    buffer.extend(advantages(batch).reshape(-1))  # flat: the loss takes single steps as well as rows
    for _ in range(EPOCHS * MINIBATCHES):
        out = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for key, value in out.items() if key.startswith("loss_")).backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
        optimizer.step()
    print(f"return {returns[-1]:7.0f}   explained variance {float(out['explained_variance']):5.2f}", flush=True)
print(f"first return {returns[0]:.0f}, last return {sum(returns[-5:]) / len(returns[-5:]):.0f} (mean of five batches)")
