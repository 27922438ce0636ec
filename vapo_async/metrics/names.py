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
AGE_MEAN = "age_mean"  # versions, over the batch's groups
AGE_MAX = "age_max"
TOKENS_PER_S = "tokens_per_s"  # generated
GENERATION_WAIT = "generation_wait"  # share of the step's time, in [0, 1]
LEARNING_WAIT = "learning_wait"
STEP_S = "step_s"
VERSION = "version"  # publications so far
