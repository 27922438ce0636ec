"""The algorithm's part of the configuration: one switch for each technique (docs/methods.md)."""

from dataclasses import dataclass
from enum import Enum


class AdvantageKind(Enum):
    """Where advantages come from."""

    gae = "gae"  # the critic
    group = "group"  # the group's mean and standard deviation; no critic is built


class LossAggregation(Enum):
    """How per-token losses become one number."""

    token = "token"  # sum over all tokens / tokens of the global mini-batch
    sequence = "sequence"  # mean over each response, then over the responses of the global mini-batch


class ImportanceKind(Enum):
    """Which ratio corrects for the lag (docs/methods.md)."""

    naive = "naive"  # clip pi_theta / pi_behav
    decoupled = "decoupled"  # clip pi_theta / pi_prox, weighted by pi_prox / pi_behav
    a3po = "a3po"  # decoupled, with pi_prox interpolated by token age instead of evaluated
    dis = "dis"  # no clip: log pi_theta weighted by pi_theta / pi_behav inside the clip range, by 0 outside
    m2po = "m2po"  # no clip: the harmful tokens of largest (log ratio)^2 are masked


class MismatchKind(Enum):
    """What is done about pi_prox / pi_behav where engine and learner disagree (docs/methods.md)."""

    none = "none"
    tis = "tis"  # truncated above, per token
    icepop = "icepop"  # tokens outside the range get no gradient
    mis = "mis"  # responses whose geometric mean lies outside the range get no gradient


class ValueTargetKind(Enum):
    """What the critic is trained on."""

    lambda_return = "lambda_return"  # of the rewards as they were sampled
    vtrace = "vtrace"  # corrected for the lag by truncated importance ratios


@dataclass
class AlgorithmConfig:
    """One switch for each technique of VAPO (docs/methods.md)."""

    groups_per_batch: int = 16
    """B: prompts per rollout batch."""
    group_size: int = 16
    """G: responses per prompt (technique 7, group sampling)."""
    group_sampling: bool = True
    """False: as many responses, each to a prompt of its own: groups_per_batch · group_size prompts × 1."""
    minibatches: int = 4
    """Optimizer steps per rollout batch and epoch: as many parts, whose sizes differ by one response at most."""
    epochs: int = 1
    """Passes over a rollout batch."""
    value_pretraining_steps: int = 40
    """Batches that train only the critic, on Monte-Carlo returns of the fixed initial policy (technique 1). 0 = off."""
    advantage: AdvantageKind = AdvantageKind.gae
    gamma: float = 1.0
    """Discount."""
    lmbda_critic: float = 1.0
    """λ of the critic's target (technique 2, decoupled GAE). Set equal to ``lmbda`` to couple them."""
    length_adaptive: bool = True
    """λ_policy = 1 − 1/(alpha·l) per response (technique 3); False uses ``lmbda``."""
    alpha: float = 0.05
    """α of length-adaptive GAE."""
    lmbda: float = 0.95
    """λ of the policy's advantage where ``length_adaptive`` is off."""
    whiten_advantage: bool = True
    """Zero mean, unit variance over the batch's response tokens; GAE only, ``group`` normalises within each group."""
    aggregation: LossAggregation = LossAggregation.token
    """Token-level loss (technique 4)."""
    clip_low: float = 0.2
    """ε_low: ratios below 1 − ε_low are clipped."""
    clip_high: float = 0.28
    """ε_high (technique 5, Clip-Higher); PPO has it equal to ``clip_low``."""
    nll_coef: float = 0.1
    """μ of the positive-example LM loss (technique 6). 0 = off."""
    importance: ImportanceKind = ImportanceKind.decoupled
    behaviour_weight_cap: float | None = 5.0
    """Upper bound c of pi_prox / pi_behav with ``decoupled`` and ``a3po``; null = none."""
    m2po_threshold: float = 0.04
    """τ: ``m2po`` masks tokens until the mean of (log ratio)² is below it."""
    mismatch: MismatchKind = MismatchKind.none
    """Correction of the engine mismatch, on top of ``importance``."""
    mismatch_low: float = 0.5
    """Lower end of the range of pi_prox / pi_behav; ``icepop`` and ``mis``."""
    mismatch_high: float = 2.0
    """Upper end of that range; what ``tis`` truncates at."""
    dual_clip: float | None = None
    """c > 1: where the advantage is negative the objective is at least c·advantage; null = off."""
    kl_coef: float = 0.0
    """β: weight of the KL to the base policy, which is then kept in memory. 0 = off."""
    overlong_cache: float = 0.0
    """L_cache / L_max of the soft overlong punishment (DAPO), L_max = ``task.max_response_tokens``; 0 = off."""
    overlong_filter: bool = False
    """Leaves responses that the length limit cut out of every loss (DAPO's overlong filtering)."""
    dynamic_sampling: bool = False
    """Refunds groups that are all right or all wrong and draws others (DAPO); never in value pretraining."""
    dynamic_sampling_patience: int = 20
    """Batches' worth of groups that may be refunded in a row before the run ends with an error."""
    value_target: ValueTargetKind = ValueTargetKind.lambda_return
    """Value pretraining always takes Monte-Carlo returns."""
    vtrace_rho_cap: float = 1.0
    """ρ̄: truncation of the ratio that weighs a temporal difference (V-trace)."""
    vtrace_c_cap: float = 1.0
    """c̄: truncation of the ratio that carries differences backwards (V-trace)."""
    critic_updates: int = 1
    """K: critic updates per policy update."""
    value_clip: float | None = None
    """Clip range of the value loss; null = off. Always off in value pretraining."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. 0 = off."""
    policy_lr: float = 1e-6
    """AdamW's, for the policy. 0 leaves it as it is."""
    critic_lr: float = 2e-6
    """AdamW's, for the critic."""
    lr_warmup_steps: int = 0
    """Optimizer steps of linear warm-up, constant after."""
    weight_decay: float = 0.0
    """AdamW's, for policy and critic; the share per step is learning rate times this."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm, policy and critic apart."""


def without_groups(algorithm: AlgorithmConfig) -> None:
    """Spells ``group_sampling: false`` out in the sizes; doing it twice changes nothing."""
    if not algorithm.group_sampling:
        algorithm.groups_per_batch, algorithm.group_size = algorithm.groups_per_batch * algorithm.group_size, 1
