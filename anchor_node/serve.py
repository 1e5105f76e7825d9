"""`anchor_node serve`: from a run file to a finished run folder. Prepares, serves, and writes the report at the end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from anchor_node.admission import Admission, secure
from anchor_node.books import Books
from anchor_node.calibrator import BasisKeeper, calibration_samples, directions, first_bases
from anchor_node.checkpoints import Checkpoint, CheckpointError, candidates, found, load_bases
from anchor_node.corrector import Corrector
from anchor_node.live import LiveTable
from anchor_node.memory import Memory, kept_bases, recall
from anchor_node.service import AnchorService
from anchor_node.standing import phase
from anchor_node.steering import Steering
from codec.spec import Direction
from swarm_core.config import RunConfig
from swarm_core.data.dataset import Row, load_rows, prompt_indices
from swarm_core.data.prompts import encode_prompt
from swarm_core.errors import UserError
from swarm_core.exits import leave_terminal
from swarm_core.learning.latency import FireSchedule, read_trace
from swarm_core.learning.objective import master_dtype
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import eos_ids, fingerprint, read_shape, resolve
from swarm_core.models.export import describe_parts
from swarm_core.models.reading import load_tokenizer, open_stage
from swarm_core.run_folder import ADDRESS_FILE, HF, JOURNAL_FILE, MANIFEST_FILE, make_folder
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.health import Health
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import BasisSet
from swarm_core.wire.streams import dialable_here

log = logging.getLogger(__name__)
REMIND_S = 60.0  # between two words to whoever watches a swarm that waits for a sampler


@dataclass(frozen=True)
class ServeArguments:
    """The command line of `anchor_node serve`."""

    config: RunConfig
    config_path: Path
    listen: str
    out: Path
    resume: bool
    resume_from: str = ""  # the checkpoint to go back to, where it is not the newest
    admission: Admission = field(default_factory=Admission)
    health_port: int | None = None


def prepare(config: RunConfig) -> tuple[Manifest, Path]:
    """Read the checkpoint's shape and fix the manifest. Raises ModelError, PartitionError, ConfigError."""
    path = resolve(config.model.path)
    shape = read_shape(path)
    return make_manifest(config, shape, fingerprint(path)), path


async def serve(arguments: ServeArguments, *, signals: bool = True) -> str:
    """Serve one run to its end; returns why it ended. Raises typed errors with one readable line each.

    `signals` False leaves SIGINT and SIGTERM alone, for an anchor that shares its process.
    """
    config, out = arguments.config, arguments.out
    manifest, model_path = prepare(config)
    memory = recall(out, manifest.digest()) if arguments.resume and not arguments.resume_from else None
    older = _candidates(arguments, manifest, memory)
    resume = older[0] if older else None
    rows = load_rows(config.data.train)  # a row without an answer is refused before anything starts
    if config.data.validation is not None:
        load_rows(config.data.validation)
    screen = _table(config, manifest, memory.tick if memory else resume.tick if resume else 0)
    service = AnchorService(manifest, screen, out, older, Ledger(), memory)
    if config.checkpoint.hf:
        dtype = master_dtype(config.run.precision)
        service.describe = lambda folder: describe_parts(manifest.spans, model_path, folder / HF, dtype)
    # The socket before anything of the run is written: a port in use must not leave a trace in the folder.
    renewals = secure(service.server, arguments.listen, out, arguments.admission)
    address = await service.server.start(arguments.listen)
    service.address = dialable_here(address)
    health = Health()
    with contextlib.ExitStack() as stack:
        try:
            if renewals is not None:
                stack.callback(renewals.cancel)
            await health.start(arguments.health_port, arguments.listen)
            health.startup = health.ready = partial(_answering, service)
            stack.enter_context(_alone(out))
            if resume is None and memory is None:
                _refuse_used(out)
            service.books = Books(out, service.memory)
            _write_run_files(arguments, manifest, model_path)
        except BaseException:
            await service.server.stop()
            await health.stop()
            raise
        if signals:
            _on_signals(service)
        screen.start()
        reminder = asyncio.create_task(_remind(service))
        try:
            slow = service.slow
            if (fires := manifest.fires(trace_of(config))) is not None:
                slow.corrector = await asyncio.to_thread(corrector_of, service, model_path, fires)
                if memory is not None:
                    slow.corrector.take_up(None)
                replays = asyncio.create_task(slow.corrector.run())
                replays.add_done_callback(slow.ended)
                stack.callback(replays.cancel)
            if config.links.kind == "lowrank" and manifest.boundaries:
                keeper = None
                if memory is None or resume is not None:
                    keeper = await asyncio.to_thread(keeper_of, manifest, model_path, rows, resume)
                if memory is not None:
                    slow.keeper_at_start, keeper = keeper, _keeper(manifest, _broadcast(out))
                slow.use(keeper)
                service.resuming.use = lambda checkpoint: slow.use_at_start(_keeper(manifest, load_bases(checkpoint)))
            service.open()
            _announce(out / ADDRESS_FILE, service.address)
            log.info("anchor of run %s (manifest %s) listening on %s", config.run.name, manifest.digest()[:12], address)
            return await service.over
        finally:
            reminder.cancel()
            await service.close()
            await health.stop()
            screen.stop()
            service.books.close()
            (out / ADDRESS_FILE).unlink(missing_ok=True)


def _answering(service: AnchorService) -> tuple[bool, str]:
    """Started and ready are one to an anchor: members must be able to dial it, whatever the others do."""
    return service.opened and not service.over.done(), phase(service)


def _refuse_used(out: Path) -> None:
    metrics = out / "metrics.jsonl"
    ticked = metrics.exists() and '"type": "tick"' in metrics.read_text(errors="replace")
    if ticked or found(out) or (out / JOURNAL_FILE).exists():
        raise CheckpointError(f"{out} holds a run already: give --resume to continue it, or another --out")


async def _remind(service: AnchorService) -> None:
    while True:
        await asyncio.sleep(REMIND_S)
        service.samplers.ask()
        service.ask_for_stages()
        service.off_host.remind()


def _announce(file: Path, address: str) -> None:
    """Write the address whole or not at all: others wait for the file to appear."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(address + "\n")
    temporary.rename(file)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a run folder: two anchors would write over each other."""
    with (make_folder(out) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{out} is in use by another anchor: stop that one, or give another --out") from None
        yield


def keeper_of(manifest: Manifest, model_path: Path, rows: list[Row], resume: Checkpoint | None) -> BasisKeeper:
    """The keeper of the bases, with those of a checkpoint or with a version 0 of its own making."""
    return _keeper(manifest, load_bases(resume) if resume else _calibrate(manifest, model_path, rows))


def _keeper(manifest: Manifest, current: BasisSet) -> BasisKeeper:
    links, spec = manifest.config.links, manifest.link()
    steering = {
        direction: Steering(links.bytes_per_token, links.target_share, spec.columns(direction))
        for direction in directions(spec)
    }
    try:
        return BasisKeeper(spec, manifest.boundaries, current, links.fit, links.fit_ridge, steering)
    except BadFrame as error:
        raise CheckpointError(f"version {current.version} of the bases cannot be used: {error}") from None


def _broadcast(out: Path) -> BasisSet:
    """The bases that the members at work hold or are to hold. Raises CheckpointError."""
    try:
        return kept_bases(out)
    except (OSError, BadFrame) as error:
        raise CheckpointError(f"{out}: the bases of the run at work cannot be read ({error})") from None


def _candidates(arguments: ServeArguments, manifest: Manifest, memory: Memory | None) -> list[Checkpoint]:
    """Where a run may go on whose members come anew, newest first. A run at work needs none. Raises CheckpointError."""
    if not (arguments.resume or arguments.resume_from) or memory is not None and not found(arguments.out):
        return []
    return candidates(arguments.out, manifest, arguments.resume_from)


def corrector_of(service: AnchorService, model_path: Path, fires: FireSchedule) -> Corrector:
    """The provider of corrections. Raises LearningError where the replay ring is too small for the cadence."""
    device = service.manifest.config.run.device
    cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
    return Corrector(
        service.manifest,
        model_path,
        service.out,
        torch.device("cuda" if cuda else "cpu"),
        fires,
        send=service.slow.send_correction,
        event=service.event,
        adopt=service.slow.adopt_bases,
        now=lambda: service.tick,
        bases=lambda version: service.slow.keeper.held(version) if service.slow.keeper is not None else None,
    )


def trace_of(config: RunConfig) -> tuple[int, ...]:
    """The latencies of `anchor.latency_trace`. Raises LearningError, UserError."""
    file = config.anchor.latency_trace
    if file is None or config.corrections.merger == "none":
        return ()
    try:
        return read_trace(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"anchor.latency_trace {file}: cannot be read ({error}); wanted a text file, a K a line"
        ) from None


def _table(config: RunConfig, manifest: Manifest, first_tick: int) -> LiveTable:
    link = manifest.link()
    words = f"{manifest.boundaries} x {link.kind}"
    if link.kind == "lowrank":
        words += f", rank {link.columns(Direction.FORWARD)}/{link.columns(Direction.BACKWARD)} of {link.width}"
    return LiveTable(
        config.run.name,
        stages=manifest.stages,
        links=words,
        target_ticks=config.run.ticks,
        first_tick=first_tick,
        merger=config.corrections.merger,
    )


def _write_run_files(arguments: ServeArguments, manifest: Manifest, model_path: Path) -> None:
    out, link = arguments.out, manifest.link()
    note = f"# {arguments.config_path} as it was read, with what the command line set; every knob, paths absolute.\n\n"
    (out / "run.toml").write_text(note + arguments.config.to_toml())
    described = json.loads(manifest.to_json())
    described |= {
        "digest": manifest.digest(),
        "ranks": {"forward": link.columns(Direction.FORWARD), "backward": link.columns(Direction.BACKWARD)},
        "shape": asdict(read_shape(model_path)),
    }
    (out / MANIFEST_FILE).write_text(json.dumps(described, indent=1, default=str) + "\n")


def _calibrate(manifest: Manifest, model_path: Path, rows: list[Row]) -> BasisSet:
    """Version 0, from the initial checkpoint and a few training prompts with their answers."""
    config = manifest.config
    tokenizer = load_tokenizer(model_path)
    end = list(eos_ids(model_path))[:1]
    chosen = [rows[i] for i in prompt_indices(len(rows), config.run.seed, 0, config.anchor.calibration_prompts)]
    prompts = [encode_prompt(tokenizer, row.prompt, config.data.chat_template) for row in chosen]
    answers = [tokenizer(str(row.answer), add_special_tokens=False)["input_ids"] + end for row in chosen]
    generator = torch.Generator().manual_seed(config.run.seed)
    stages = [open_stage(model_path, span) for span in manifest.spans]
    links, samples = config.links, calibration_samples(prompts, answers, generator)
    steps = links.steps
    bases = first_bases(stages, samples, manifest.link(), links.fit, links.fit_ridge, links.outliers, steps)
    log.info("basis version 0 calibrated on %d prompts", len(chosen))
    return bases


def _on_signals(service: AnchorService) -> None:
    """The first SIGINT, SIGTERM or SIGHUP drains: the tick ends, a checkpoint is written. The second one ends at once."""
    loop = asyncio.get_running_loop()
    asked = False

    def stop(name: str) -> None:
        nonlocal asked
        if asked:  # calibrating, or waiting for a tick: either way, the default of the signal is what was asked for
            for number in numbers:
                loop.remove_signal_handler(number)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        asked = True
        if name == "SIGHUP":
            leave_terminal()
        print(f"{name}: stopping after this tick, with a checkpoint; once more to stop at once", file=sys.stderr)
        service.drain(name)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup a hang-up is ignored, and stays so
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop, number.name)
