"""A plan as what the simulation of engines and learner takes (``benchmarks/simulate.py``)."""

from typing import Any

from vapo_async.config import Config, KVCacheOnUpdate
from vapo_async.planning.plan import Plan


def simulated_cluster(config: Config, plan: Plan) -> dict[str, Any]:
    """Plain data, by the keys of a file of ``benchmarks/clusters/``."""
    lengths, speed, publication = plan.lengths, plan.decoding, plan.publication
    return {
        "name": f"{plan.name} on {plan.cluster.name}",
        "batch": {"groups": config.algorithm.groups_per_batch, "group_size": config.algorithm.group_size},
        "lengths": {
            "median_tokens": lengths.median_tokens,
            "sigma": lengths.sigma,
            "max_tokens": lengths.max_tokens,
            "prompt_tokens": round(lengths.prompt_tokens),
        },
        "rollout": {
            "workers": plan.layout.workers,
            "slots": speed.slots,
            "tokens_per_s_alone": speed.tokens_per_s_alone,
            "tokens_per_s_full": speed.tokens_per_s,
            "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        },
        "publication": {
            "transfer_s": publication.transfer_s,
            "stall_s": publication.stall_s,
            "recompute_kv": config.engine.kv_cache_on_update is KVCacheOnUpdate.recompute,
        },
        "learner": {"tokens_per_s": plan.batch_tokens / plan.learning.seconds},
    }
