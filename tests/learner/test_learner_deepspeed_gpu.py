"""DeepSpeed on a GPU, over NCCL."""

import pytest
from rank_processes import in_ranks
from test_learner_deepspeed import STAGES, Found, learned, make_learner
from test_learner_learner import assert_close, make_batch

from vapo_async.learner.ranks import OneRank, Ranks


def on_a_gpu(ranks: Ranks) -> dict[int, Found]:
    return {stage: learned(make_learner(ranks, stage, device="cuda"), [make_batch()]) for stage in STAGES}


@pytest.mark.gpu
def test_all_stages_learn_on_a_gpu_what_plain_torch_learns_on_the_cpu() -> None:
    """Over NCCL. Only the rounding is another."""
    metrics, parameters = learned(make_learner(OneRank(), None), [make_batch()])
    for its_metrics, its_parameters in in_ranks(1, on_a_gpu, device="cuda")[0].values():
        for name, value in metrics[0].items():
            assert its_metrics[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
        assert_close(its_parameters, parameters, atol=1e-4)
