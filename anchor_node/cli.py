"""The command line of `anchor_node`. Parses and hands over; imports of heavy libraries wait until a command runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = "The slow node of a Kedge swarm: starts the run, keeps the compression basis fresh, keeps the books."
EXAMPLES = """examples:
  anchor_node serve --config examples/tiny/run.toml --listen 0.0.0.0:7400 --out runs/demo
      serve a run; it starts as soon as every stage has joined
  anchor_node serve --config run.toml --listen 0.0.0.0:7400 --out runs/demo --resume
      continue it from the newest checkpoint
  anchor_node token create --out runs/demo --role stage --stage 2
      admit one machine as stage 2: prints a token, good once and for an hour
  anchor_node token create --out runs/demo --role sampler --ttl 10m
  anchor_node token list --out runs/demo
  anchor_node token revoke --out runs/demo 3f9c
  anchor_node serve --config run.toml --dry-run
      check the run file, model, data, reward and tokenizer, and print the plan: stages, bytes a tick, memory
  anchor_node status --anchor anchor.example.org:7400
      where the swarm stands, also when it hangs: who is there, who waits for what, since when
  anchor_node export runs/demo --to exported
      write the newest checkpoint as a model that transformers loads
  anchor_node report runs/demo
      write report.html again and print the ledger
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from swarm_core.exits import version

    top = argparse.ArgumentParser(
        prog="anchor_node",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a run", epilog=EXAMPLES, formatter_class=top.formatter_class)
    serve.add_argument("--config", type=Path, required=True, metavar="RUN.TOML", help="the run file")
    serve.add_argument(
        "--listen", default="127.0.0.1:7400", metavar="HOST:PORT", help="where workers dial in (default %(default)s)"
    )
    serve.add_argument(
        "--out", type=Path, default=Path("runs/run"), metavar="DIR", help="the run folder (default %(default)s)"
    )
    serve.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KNOB=VALUE", help="override a knob; may be repeated"
    )
    serve.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    serve.add_argument(
        "--resume-from", default="", metavar="NAME", help="continue from that checkpoint; later ones are set aside"
    )
    how = serve.add_mutually_exclusive_group()
    how.add_argument("--tls", action="store_true", help="TLS and admission by token on loopback, too; elsewhere always")
    how.add_argument(
        "--insecure", action="store_true", help="neither, which is the default on loopback; refused elsewhere"
    )
    how.add_argument(
        "--trusted-network",
        action="store_true",
        help="neither, anywhere: whoever reaches the port can take over the run",
    )
    serve.add_argument(
        "--certificate-life",
        default="24h",
        metavar="TIME",
        help="of each certificate, renewed at 2/3 (default %(default)s)",
    )
    serve.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    serve.add_argument(
        "--health-port",
        type=int,
        metavar="PORT",
        help="answer /startup, /ready and /live there over plain HTTP (default: nowhere)",
    )
    serve.add_argument("--log", type=Path, metavar="FILE", help="write the log there instead of to stderr")

    status = commands.add_parser(
        "status", help="where a running swarm stands", epilog=EXAMPLES, formatter_class=top.formatter_class
    )
    whom = status.add_mutually_exclusive_group(required=True)
    whom.add_argument("--anchor", metavar="HOST:PORT", help="the anchor's address")
    whom.add_argument("--out", type=Path, metavar="DIR", help="the run folder of an anchor on this machine")
    status.add_argument("--tls", action="store_true", help="with --out: the anchor there was started with TLS")
    status.add_argument(
        "--certificate", type=Path, metavar="FILE", help="with --anchor over TLS: a worker's OUT/identity/stage-2.pem"
    )
    status.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    status.add_argument(
        "--wait",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="how long to wait for the anchor (default %(default)s)",
    )

    export = commands.add_parser(
        "export", help="write a checkpoint in Hugging Face layout", epilog=EXAMPLES, formatter_class=top.formatter_class
    )
    export.add_argument("run", type=Path, metavar="DIR", help="a run folder, or one checkpoint folder in it")
    export.add_argument("--to", type=Path, required=True, metavar="HF_DIR", help="the folder to write")

    report = commands.add_parser(
        "report", help="write a run's report.html again", epilog=EXAMPLES, formatter_class=top.formatter_class
    )
    report.add_argument("run", type=Path, metavar="DIR", help="a run folder")
    _token(commands.add_parser("token", help="admit machines", epilog=EXAMPLES, formatter_class=top.formatter_class))
    return top


def _token(token: argparse.ArgumentParser) -> None:
    verbs = token.add_subparsers(dest="verb", required=True, metavar="VERB")
    shown = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    create = verbs.add_parser("create", help="print a token that admits one machine", **shown)
    create.add_argument("--role", choices=("stage", "sampler"), required=True, help="what the machine is to be")
    create.add_argument("--stage", type=int, metavar="I", help="which stage, counted from 0")
    create.add_argument("--ttl", metavar="TIME", help="how long it is good: 30s, 10m, at most (and by default) 1h")
    known = verbs.add_parser("list", help="all tokens and what became of them", **shown)
    revoke = verbs.add_parser("revoke", help="make a token useless that nobody has used", **shown)
    revoke.add_argument("token", metavar="ID", help="as list shows it, or its beginning")
    for verb in (create, known, revoke):
        verb.add_argument(
            "--out", type=Path, default=Path("runs/run"), metavar="DIR", help="the run folder (default %(default)s)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 refused input, 1 something broke, 130 interrupted."""
    arguments = parser().parse_args(argv)
    from swarm_core.exits import quiet_grpc, run_to_exit_code

    quiet_grpc()

    name = f"anchor_node {arguments.command}"
    if arguments.command == "serve":
        return run_to_exit_code(name, lambda: _serve(arguments))
    if arguments.command == "token":
        return run_to_exit_code(f"{name} {arguments.verb}", lambda: _on_token(arguments))
    if arguments.command == "status":
        from anchor_node.status import show_status

        return run_to_exit_code(
            name,
            lambda: show_status(
                arguments.anchor,
                arguments.out,
                as_json=arguments.json,
                wait_s=arguments.wait,
                certificate=arguments.certificate,
                tls=arguments.tls,
            ),
        )
    if arguments.command == "export":
        from anchor_node.export import export_run

        return run_to_exit_code(name, lambda: export_run(arguments.run, arguments.to))
    return run_to_exit_code(name, lambda: _report(arguments.run))


def _serve(arguments: argparse.Namespace) -> int:
    from swarm_core.config import load, parse_overrides

    config = load(arguments.config, parse_overrides(arguments.set))
    if arguments.dry_run:
        from anchor_node.plan import print_plan

        print_plan(config)
        return 0
    _log_to(arguments.log)
    from anchor_node.admission import Admission, read_certificate_life
    from anchor_node.serve import ServeArguments, serve

    life_s = read_certificate_life(arguments.certificate_life)
    admission = Admission(arguments.tls, arguments.insecure, arguments.trusted_network, life_s)
    given = ServeArguments(
        config,
        arguments.config,
        arguments.listen,
        arguments.out,
        arguments.resume,
        arguments.resume_from,
        admission,
        arguments.health_port,
    )
    reason = asyncio.run(serve(given))
    print(f"The run is over: {reason}.")
    return _report(arguments.out)


def _on_token(arguments: argparse.Namespace) -> None:
    from anchor_node.admission import create_token, list_tokens, revoke_token
    from swarm_core.run_folder import make_folder

    match arguments.verb:
        case "create":
            create_token(make_folder(arguments.out), arguments.role, arguments.stage, arguments.ttl)
        case "list":
            list_tokens(arguments.out)
        case "revoke":
            revoke_token(arguments.out, arguments.token)


def _log_to(file: Path | None) -> None:
    from swarm_core.errors import UserError

    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.INFO, filename=file, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
        )
    except OSError as error:
        raise UserError(f"--log {file} cannot be written to ({error.strerror}): give a file that may be") from None


def _report(run: Path) -> int:
    from rich.console import Console

    from swarm_core.errors import UserError

    if not run.is_dir():
        raise UserError(f"{run} is not a run folder: give the --out of a run")

    from anchor_node.record import ledger_summary, print_ledger
    from anchor_node.report import write_report

    page = write_report(run)
    print_ledger(Console(), ledger_summary(run))
    print(f"Report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
