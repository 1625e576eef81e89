"""Host tensors → the device, without waiting for what runs there."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The host's `tensor` on the device.

    A copy from pageable memory makes the host wait for all that a GPU has been given to do; one from pinned memory
    only takes its place in the queue. The pinned copy is not given to anyone else before it has been read.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
