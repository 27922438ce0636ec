"""The shipped experiments hold every number of the papers' runs."""

import pytest

from vapo_async.config.load import flatten, load_config

DATA = {
    "task.train": "BytedTsinghua-SIA/DAPO-Math-17k",
    "task.heldout": "BytedTsinghua-SIA/AIME-2024",
    "task.max_prompt_tokens": 2048,
    "task.max_response_tokens": 20_480,  # expected 16,384 and a cache of 4,096
    "task.reward_correct": 1.0,
    "task.reward_wrong": -1.0,
    "model.path": "Qwen/Qwen2.5-32B",
    "model.dtype": "bfloat16",
    "engine.temperature": 1.0,
    "engine.top_p": 1.0,
    "engine.device": "cuda",
    "learner.device": "cuda",
    "learner.zero_stage": 3,
    "learner.activation_checkpointing": True,
    "evaluation.problems": 30,
    "evaluation.samples": 32,  # avg@32
    "evaluation.temperature": 1.0,
    "evaluation.top_p": 0.7,
}
BOTH = {
    "algorithm.groups_per_batch": 512,
    "algorithm.group_size": 16,
    "algorithm.group_sampling": True,
    "algorithm.minibatches": 16,  # mini-batches of 512 responses
    "algorithm.epochs": 1,
    "algorithm.aggregation": "token",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.kl_coef": 0.0,
    "algorithm.entropy_coef": 0.0,
    "algorithm.overlong_filter": False,
    "algorithm.policy_lr": 1e-6,
    "algorithm.lr_warmup_steps": 320,  # 20 batches, constant after
}
VAPO = {
    "steps": 313,  # 5,000 optimizer steps
    "algorithm.advantage": "gae",
    "algorithm.value_pretraining_steps": 50,
    "algorithm.gamma": 1.0,
    "algorithm.lmbda_critic": 1.0,
    "algorithm.length_adaptive": True,
    "algorithm.alpha": 0.05,
    "algorithm.nll_coef": 0.1,
    "algorithm.critic_lr": 2e-6,
    "algorithm.critic_updates": 1,
    "algorithm.value_clip": None,
    "algorithm.dynamic_sampling": False,
    "algorithm.overlong_cache": 0.0,
}
DAPO = {
    "algorithm.advantage": "group",
    "algorithm.value_pretraining_steps": 0,
    "algorithm.nll_coef": 0.0,
    "algorithm.dynamic_sampling": True,
    "algorithm.overlong_cache": 0.2,  # 4,096 of 20,480
    "algorithm.weight_decay": 0.1,
}


@pytest.mark.parametrize(
    ("experiment", "numbers"),
    [("paper_qwen2.5_32b", DATA | BOTH | VAPO), ("dapo_qwen2.5_32b", DATA | BOTH | DAPO)],
)
def test_experiments_hold_the_papers_numbers(experiment: str, numbers: dict[str, object]) -> None:
    config = load_config([f"experiment={experiment}"])
    flat = flatten(config)
    assert {key: flat[key] for key in numbers} == numbers
    assert flat["name"] == experiment
    per_minibatch = flat["algorithm.groups_per_batch"] * flat["algorithm.group_size"] / flat["algorithm.minibatches"]
    assert per_minibatch == 512
    assert round(5000 / flat["algorithm.minibatches"] + 0.5) == flat["steps"]
    kinds = (type(config.engine).__name__, type(config.learner).__name__, type(config.launcher).__name__)
    assert kinds == ("VLLMEngineConfig", "DeepSpeedLearnerConfig", "RayLauncherConfig")
