"""What the slow circuit costs in bytes and keeps in fidelity, each wire form beside the others, on one run. Judges no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec import corrections, weight_delta
from codec.corrections import CorrectionEncoder, CorrectionSpec
from experiments.decoupling.anchor import Gradients, cosine
from experiments.decoupling.cells import SIZES
from experiments.decoupling.training import LaggingTraining
from swarm_core.config import load
from swarm_core.wire.frames import message_bytes
from swarm_worker.correcting import Capture

APART = 20  # ticks between two snapshots here; their deltas over more of them are taken as well
FORMS = ("sign", "lowrank", "topk", "bf16")
FAST = ("activation", "gradient")
