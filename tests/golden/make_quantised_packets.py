"""Writes quantised_packets.json: packets of format 2, one for each layout, and the rows that they mean, as hex.

To be run when a layout is added, never to make a test pass: packets that were sent once must decode for ever.

    python tests/golden/make_quantised_packets.py
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "codec")]

from codec.link_codec import LinkCodec
from codec.reuse import ReuseStore
from codec.spec import Direction, LinkSpec

SPEC = {"kind": "lowrank", "width": 4, "rank_forward": 2, "rank_backward": 2, "zstd": "off"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("FORWARD", {"quantiser_forward": "int8"}),
    "int4": ("BACKWARD", {"quantiser_backward": "int4"}),
    "uniform": ("FORWARD", {"quantiser_forward": "uniform"}),
    "uniform_zstd": ("FORWARD", {"quantiser_forward": "uniform", "zstd": "auto"}),
    "uniform_packet": ("BACKWARD", {"quantiser_backward": "uniform", "gradient_scale": "packet"}),
    "uniform_exact": (
        "BACKWARD",
        {"quantiser_backward": "uniform", "backward": "exact", "exact_step": 0.5},
    ),
    "outliers_bf16": ("FORWARD", {"outliers": 8.0}),
    "outliers_int8": ("FORWARD", {"quantiser_forward": "int8", "outliers": 8.0}),
    "outliers_int4": ("FORWARD", {"quantiser_forward": "int4", "outliers": 8.0}),
    "outliers_uniform": ("FORWARD", {"quantiser_forward": "uniform", "outliers": 8.0}),
    "changes": ("FORWARD", {"quantiser_forward": "uniform", "reuse": True}),
    "changes_outliers": ("FORWARD", {"quantiser_forward": "uniform", "reuse": True, "outliers": 8.0}),
}


def main() -> None:
    from test_golden_packets import KEYS, QUANTISED_AXES, quantised_rows

    golden = {}
    for name, (direction, more) in CASES.items():
        spec, to = LinkSpec(**SPEC | more), Direction[direction]
        codec, store, packets, arrived = LinkCodec(spec), ReuseStore(1 << 16), [], []
        for turn in range(3 if spec.reuse else 1):
            packet = codec.encode(
                quantised_rows(turn), to, QUANTISED_AXES, rows=store.rows(KEYS) if spec.reuse else None
            )
            rows_NH = codec.decode(packet, 32, to, QUANTISED_AXES, rows=store.rows(KEYS) if spec.reuse else None)
            packets.append(packet.hex())
            arrived.append(rows_NH.numpy().tobytes().hex())
            store.settle(keep=True)
        golden[name] = {"spec": SPEC | more, "direction": direction, "packets": packets, "arrived": arrived}
    target = Path(__file__).with_name("quantised_packets.json")
    target.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
