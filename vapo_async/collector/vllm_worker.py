"""Methods that vLLM's worker processes get beside their own."""

import torch


class WorkerExtension:
    """Mixed into vLLM's worker, see its ``worker_extension_cls``."""

    def seed_sampling(self, seed: int) -> None:
        """Starts the generators that sampling draws from anew."""
        torch.manual_seed(seed)
