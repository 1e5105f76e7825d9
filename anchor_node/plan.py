"""The plan of a run before it starts (`--dry-run`): stages, bytes a tick, memory. Estimates from integers; loads no weights."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from anchor_node.record import byte_text
from anchor_node.serve import prepare
from codec.spec import Direction, dense_bytes, packet_bytes
from swarm_core.config import RunConfig
from swarm_core.data.dataset import load_rows
from swarm_core.learning.partition import stage_flops
from swarm_core.models.architecture import read_shape
from swarm_core.models.reading import tensor_shapes

STATE_BYTES = 16  # a parameter in fp32: weight, gradient, two moments


def print_plan(config: RunConfig) -> None:
    """Validate everything a run needs and print what it would do. Raises what serving would raise."""
    manifest, path = prepare(config)
    rows = load_rows(config.data.train)
    validation = load_rows(config.data.validation) if config.data.validation else []
    shape = read_shape(path)
    console = Console()
    console.print(
        f"run [bold]{config.run.name}[/]  manifest {manifest.digest()[:12]}  {len(rows)} rows, {len(validation)} to validate"
    )
    table = Table("stage", "layers", "parameters", "weights + optimizer", "share of FLOPs")
    total = sum(stage_flops(shape, span) for span in manifest.spans)
    for span in manifest.spans:
        parameters = sum(_product(dims) for dims in tensor_shapes(shape, span).values())
        table.add_row(
            str(span.stage),
            f"{span.first_layer} to {span.last_layer - 1}",
            f"{parameters / 1e6:.2f} M",
            byte_text(parameters * STATE_BYTES),
            f"{stage_flops(shape, span) / total:.0%}",
        )
    console.print(table)
    if manifest.boundaries == 0:
        return
    g, link = config.grpo, manifest.link()
    sequences = g.prompts_per_batch * g.completions_per_prompt // g.ticks_per_pass
    tokens = sequences * g.max_completion_length
    forward, backward = packet_bytes(link, Direction.FORWARD, tokens), packet_bytes(link, Direction.BACKWARD, tokens)
    dense = 2 * dense_bytes(link.width, tokens)
    console.print(
        f"one tick, one link, {tokens:,} tokens at most (completions; prompts come on top): {byte_text(forward)} down, "
        f"{byte_text(backward)} up, {(forward + backward) / dense:.1%} of dense bf16"
    )
    for mbps in (50, 100, 500):
        seconds = max(forward, backward) * 8 / mbps / 1e6
        console.print(f"  at {mbps} Mbit/s the larger direction takes {seconds:.2f} s a tick")


def _product(dims: tuple[int, ...]) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size
