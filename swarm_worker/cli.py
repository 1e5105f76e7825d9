"""The command line of `swarm_worker`. Parses and hands over; imports of heavy libraries wait until a command runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm_worker.entry import Entry

DESCRIPTION = "Workers of a Kedge swarm: stages of the layers, samplers, or a whole swarm on one machine."
EXAMPLES = """examples:
  swarm_worker local --config examples/tiny/run.toml --stages 3 --out runs/demo
      a whole swarm on this machine: anchor, three stages and a sampler, over loopback
  swarm_worker local --config run.toml --out runs/demo --resume --ticks 400
      go on from the newest checkpoint
  swarm_worker join --stage 2 --anchor anchor.example.org:7400 --listen 0.0.0.0:7402 --advertise me.example.org:7402
      hold stage 2 of the run that this anchor serves; --token TOKEN the first time (see `anchor_node token`)
  swarm_worker doctor --anchor anchor.example.org:7400 --listen 0.0.0.0:7402 --advertise me.example.org:7402
      would that work from here? names, ports, versions, clock, line, disk and device; nothing is joined
  swarm_worker sample --anchor anchor.example.org:7400 --engine hf
      generate rollouts for that run
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from swarm_core.exits import version

    top = argparse.ArgumentParser(
        prog="swarm_worker",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    join = commands.add_parser(
        "join", help="hold one stage of a run", epilog=EXAMPLES, formatter_class=top.formatter_class
    )
    join.add_argument("--stage", type=int, required=True, metavar="I", help="the stage to hold, counted from 0")
    _common(join)
    join.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where neighbours and samplers dial in (default %(default)s: this machine only, any port)",
    )
    join.add_argument(
        "--advertise", metavar="HOST:PORT", help="the address others should dial, if not the listening one"
    )
    _limit(join)
    join.add_argument("--expect-digest", default="", metavar="HEX", help="refuse any manifest but this one")

    sample = commands.add_parser(
        "sample", help="generate rollouts for a run", epilog=EXAMPLES, formatter_class=top.formatter_class
    )
    _common(sample)
    sample.add_argument("--engine", choices=("hf", "replay"), help="how rollouts are made (default: the manifest's)")
    sample.add_argument("--replay", type=Path, metavar="FILE", help="recorded rollouts, for --engine replay")

    doctor = commands.add_parser(
        "doctor", help="try out an anchor from here, and say what to do", epilog=EXAMPLES,
        formatter_class=top.formatter_class,
    )  # fmt: skip
    doctor.add_argument("--anchor", required=True, metavar="HOST:PORT", help="the anchor's address")
    doctor.add_argument("--listen", metavar="HOST:PORT", help="where the worker would listen: the anchor dials it back")
    doctor.add_argument("--advertise", metavar="HOST:PORT", help="the address others would dial, if another")
    doctor.add_argument(
        "--out",
        type=Path,
        default=Path("runs/worker"),
        metavar="DIR",
        help="where it would write (default %(default)s)",
    )
    _entry_options(doctor)

    local = commands.add_parser(
        "local", help="a whole swarm on this machine", epilog=EXAMPLES, formatter_class=top.formatter_class
    )
    local.add_argument("--config", type=Path, required=True, metavar="RUN.TOML", help="the run file")
    local.add_argument(
        "--out", type=Path, default=Path("runs/local"), metavar="DIR", help="the run folder (default %(default)s)"
    )
    local.add_argument("--stages", type=int, metavar="N", help="override swarm.stages")
    local.add_argument("--ticks", type=int, metavar="T", help="override run.ticks")
    local.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KNOB=VALUE", help="override a knob; may be repeated"
    )
    local.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="the anchor's address (default: any port)"
    )
    _limit(local)
    local.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    local.add_argument(
        "--resume-from", default="", metavar="NAME", help="continue from that checkpoint; later ones are set aside"
    )
    local.add_argument("--fresh", action="store_true", help="delete an earlier run in --out first")
    local.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    return top


def _limit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--limit-mbps",
        metavar="UP[:DOWN]",
        help="what each stage may use of its line, in Mbit/s on the line: 50, or 50:200 for sending and receiving",
    )


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--anchor", required=True, metavar="HOST:PORT", help="the anchor's address")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/worker"),
        metavar="DIR",
        help="checkpoint shards and logs go below it (default %(default)s)",
    )
    command.add_argument(
        "--model", metavar="PATH", help="the model's files on this machine, if not where the manifest says"
    )
    command.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the anchor (default %(default)s)",
    )
    command.add_argument(
        "--health-port",
        type=int,
        metavar="PORT",
        help="answer /startup, /ready and /live there over plain HTTP (default: nowhere)",
    )
    _entry_options(command)


def _entry_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--token",
        default="",
        metavar="TOKEN",
        help="what `anchor_node token create` printed, or a file that holds it (or KEDGE_TOKEN): needed once",
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument("--tls", action="store_true", help="use the stored certificate on loopback, too; elsewhere always")
    how.add_argument("--insecure", action="store_true", help="no TLS, the default on loopback; refused elsewhere")
    how.add_argument("--trusted-network", action="store_true", help="no TLS anywhere, as the anchor must have it, too")


def _entry(arguments: argparse.Namespace) -> Entry:
    from swarm_worker.entry import Entry

    return Entry(arguments.token, arguments.tls, arguments.insecure, arguments.trusted_network)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 refused input, 1 something broke, 130 interrupted."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    from swarm_core.exits import quiet_grpc, run_to_exit_code

    quiet_grpc()
    if arguments.command in ("join", "sample"):
        # Until it is at work there is no tick to end: SIGTERM is Ctrl-C, which closes streams, and says so. What a script
        # starts in its background is born deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if arguments.command == "local":
        from swarm_worker.local import run_local

        return run_to_exit_code("swarm_worker local", lambda: run_local(arguments))
    if arguments.command == "join":
        return run_to_exit_code("swarm_worker join", lambda: _join(arguments))
    if arguments.command == "doctor":
        from swarm_worker.doctor import DoctorArguments, examine

        asked = DoctorArguments(
            arguments.anchor, arguments.listen, arguments.advertise, arguments.out, _entry(arguments)
        )
        return run_to_exit_code("swarm_worker doctor", lambda: examine(asked))
    code = run_to_exit_code("swarm_worker sample", lambda: _sample(arguments))
    logging.shutdown()
    os._exit(code)  # a generation under way cannot be interrupted, and the interpreter would wait for it


def _join(arguments: argparse.Namespace) -> None:
    _refuse_early(arguments)
    from swarm_core.wire.allocator import keep_large_blocks
    from swarm_worker.stage_process import StageArguments, hold_stage

    keep_large_blocks()
    given = StageArguments(
        stage=arguments.stage,
        anchor=arguments.anchor,
        listen=arguments.listen,
        advertise=arguments.advertise,
        out=arguments.out,
        model=arguments.model,
        expect_digest=arguments.expect_digest,
        wait_s=arguments.wait,
        limit_mbps=arguments.limit_mbps,
        entry=_entry(arguments),
        health_port=arguments.health_port,
    )
    asyncio.run(hold_stage(given))


def _sample(arguments: argparse.Namespace) -> None:
    _refuse_early(arguments)
    from swarm_worker.sampler.process import SamplerArguments, serve_rollouts

    wanted = SamplerArguments(
        anchor=arguments.anchor,
        engine=arguments.engine,
        replay=arguments.replay,
        out=arguments.out,
        model=arguments.model,
        wait_s=arguments.wait,
        entry=_entry(arguments),
        health_port=arguments.health_port,
    )
    asyncio.run(serve_rollouts(wanted))


def _refuse_early(arguments: argparse.Namespace) -> None:
    """What can be told in 0.3 s, before torch takes its 3."""
    from swarm_core.run_folder import make_folder
    from swarm_core.wire.streams import split_address

    split_address(arguments.anchor)
    make_folder(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
