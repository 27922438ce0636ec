"""The objectives: pure functions of tensors, and TorchRL modules around them."""
