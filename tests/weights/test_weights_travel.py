"""Weights as arrays and back."""

import pickle

import pytest
import torch

from vapo_async.weights.travel import to_arrays, to_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_bits_shapes_and_dtypes(dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "transposed": torch.randn(4, 6).to(dtype).t(),
        "vector": torch.tensor([float("nan"), float("inf"), -0.0]).to(dtype),
        "scalar": torch.tensor(0.1).to(dtype),
        "empty": torch.empty(0, 7, dtype=dtype),
    }
    arrays = pickle.loads(pickle.dumps(to_arrays(tensors)))
    for _, _, array in arrays.values():
        array.flags.writeable = False  # as Ray hands them out
    back = to_tensors(arrays)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (back[name], tensor)]
        assert torch.equal(*bits)


def test_memory_is_shared() -> None:
    tensor = torch.zeros(4)
    back = to_tensors(to_arrays({"x": tensor}))["x"]
    tensor[1] = 3
    assert back.tolist() == [0, 3, 0, 0]
