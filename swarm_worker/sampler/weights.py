"""What a stage publishes, as a sampler reads it: safetensors bytes to tensors, or one error. No engine, no stream."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from swarm_core.wire.errors import BadFrame


def read_weights(payload: memoryview, stage: int, version: int) -> dict[str, Tensor]:
    """The tensors of a WEIGHTS frame. Names and shapes are for the engine to judge. Raises BadFrame."""
    try:
        return load(bytes(payload))
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:  # by what is wrong in the header
        text = " ".join(str(error).split())[:200]
        raise BadFrame(f"weights of stage {stage}, version {version}, cannot be read ({text})") from None
