"""Names of the scalars that the console and the report read. Loggers take any further name (the learner has more)."""

# The learner's own
REWARD = "reward"  # mean over the batch's responses, shaping included
TRAIN_ACCURACY = "correct"  # share of correct responses of the batch
RESPONSE_LENGTH = "response_length"  # mean tokens, the end token included
ENTROPY = "entropy"  # mean over response tokens, nats
EXPLAINED_VARIANCE = "explained_variance"  # 1 − Var(R − V)/Var(R)

# Added by whoever drives the run
HELDOUT_ACCURACY = "heldout_accuracy"  # avg@k, in [0, 1]
HELDOUT_STDERR = "heldout_stderr"  # of avg@k, clustered over problems
AGE_MIN = "age_min"  # versions, over the batch's groups
AGE_MEAN = "age_mean"
AGE_MAX = "age_max"
TOKENS_PER_S = "tokens_per_s"  # generated
GENERATION_WAIT = "generation_wait"  # share of the step's time that rollout workers had nothing to do, in [0, 1]
LEARNING_WAIT = "learning_wait"  # share of the step's time that the learner waited for its batch
STEP_S = "step_s"
VERSION = "version"  # publications so far
REFUNDS = "refunds_"  # + reason: tickets that ended without a group so far
RESTARTS = "restarts"  # dead processes replaced so far, all stages
LENGTH = "length_"  # + kind of the length-bias audit: mean tokens of the responses since the last batch
LENGTH_BIAS = "length_bias"  # mean length trained on − mean length generated since the last batch, tokens

# Seconds since the last batch, all of them sums: rollout workers (or groups) that wait at the same time count each
GENERATION_WAIT_S = "generation_wait_s"  # rollout workers without anything to generate
VERDICT_WAIT_S = "verdict_wait_s"  # finished groups, for their verdicts
LEARNING_WAIT_S = "learning_wait_s"  # the learner, for its batch
LEARNING_S = "learning_s"
PUBLICATION_S = "publication_s"  # until every engine had the new weights at hand
SECONDS = (GENERATION_WAIT_S, VERDICT_WAIT_S, LEARNING_WAIT_S, LEARNING_S, PUBLICATION_S)
