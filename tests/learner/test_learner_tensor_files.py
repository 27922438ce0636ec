"""Tensors shared out over files, one for each rank."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vapo_async.learner.tensor_files import TensorFiles, save_share


@dataclass
class Place:
    """Of a process among others, which have nothing to say to each other here."""

    rank: int
    size: int

    def sum_(self, tensor: Tensor) -> None:
        raise AssertionError("each rank knows all sizes")


def optimizer(parameters: int) -> dict[str, Tensor]:
    """What AdamW has: a number beside every two large tensors."""
    found = {}
    for i in range(parameters):
        size = 1000 + 10 * i
        found |= {
            f"{i}/step": torch.tensor(1.0),
            f"{i}/exp_avg": torch.randn(size),
            f"{i}/exp_avg_sq": torch.randn(size),
        }
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_shares_are_alike_and_together_everything(ranks: int, tmp_path: Path) -> None:
    tensors = optimizer(12)
    for rank in range(ranks):
        save_share(tmp_path, "it", tensors.items(), Place(rank, ranks))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == ranks and max(sizes) - min(sizes) < 8_000  # a tensor, and the names in the head of the file
    with TensorFiles(tmp_path, "it") as found:
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        if ranks > 1:
            index = json.loads((tmp_path / "it.safetensors.index.json").read_text())
            assert index["weight_map"].keys() == tensors.keys()
            assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
            for name, file in index["weight_map"].items():
                with TensorFiles(tmp_path, file.removesuffix(".safetensors")) as one:
                    assert name in one
