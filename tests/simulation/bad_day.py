"""What is done to a simulated swarm, and what kind of swarm it is: all of it follows from a seed. Nothing is run here."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from wan import Weather

from swarm_core.config import RunConfig
from swarm_core.knobs import (
    CheckpointSection,
    DataSection,
    GrpoSection,
    LinksSection,
    ModelSection,
    RunSection,
    SamplerSection,
    SwarmSection,
)
from swarm_core.learning.partition import Span
from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_core.manifest import Manifest

VOCAB = 40


@dataclass
class Plan:
    """One run, and what will be done to it. Everything follows from the seed."""

    seed: int
    stages: int = 3
    ticks: int = 10
    per_pass: int = 2
    reuse: int = 2
    every: int = 3
    keep: int = 2
    overlap: bool = True
    probe_every: int = 0
    weather: Weather = field(default_factory=Weather)
    storm_s: float = 40.0
    rate: float = 0.15  # of deaths, freezes and partitions, a second
    power: float = 0.4  # share of deaths that take what was not synced
    failpoint: float = 0.004  # chance to die at each named point and each sync
    speed: tuple[float, ...] = (0.05,)
    apart: bool = False  # every stage has a host of its own, which may be lost with it; the anchor has copies
    slow_disk: float = 1.0  # how much longer than a command the writing of a shard takes

    @classmethod
    def of(cls, seed: int) -> Plan:
        draw = random.Random(f"plan {seed}")
        calm = seed % 10 == 0
        return cls(
            seed,
            stages=draw.choice((1, 2, 2, 3, 3, 4)),
            ticks=draw.randint(6, 12),
            per_pass=draw.randint(1, 2),
            reuse=draw.randint(1, 3),
            every=draw.choice((0, 2, 3, 5)),
            keep=draw.randint(1, 2),
            overlap=draw.random() < 0.7,
            probe_every=draw.choice((0, 0, 3)),
            weather=Weather(
                0.0 if calm else 0.3 * draw.random() ** 4,
                0.5 * draw.random(),
                draw.choice((0.0, 0.3)),
                draw.choice((0.3, 1.0, 5.0)),
                draw.choice((0.0, 0.05, 0.3)),
            ),
            rate=0.0 if calm else draw.choice((0.05, 0.1, 0.3)),
            failpoint=0.0 if calm else draw.choice((0.0, 0.01, 0.03)),
            speed=tuple(draw.choice((0.02, 0.1, 0.3)) for _ in range(4)),
            slow_disk=draw.choice((1.0, 10.0, 100.0, 1000.0)),
        )

    def manifest(self) -> Manifest:
        config = RunConfig(
            run=RunSection(ticks=self.ticks, seed=self.seed),
            model=ModelSection(path="model"),
            data=DataSection(train="train.jsonl"),
            swarm=SwarmSection(stages=self.stages, microbatch_size=2),
            grpo=GrpoSection(
                prompts_per_batch=4, completions_per_prompt=2, ticks_per_pass=self.per_pass, max_reuse=self.reuse
            ),
            links=LinksSection(fidelity_every=self.probe_every),
            sampler=SamplerSection(overlap=self.overlap),
            # A stage that is begun from a copy may lose ticks; where all share a disk, none may be.
            checkpoint=CheckpointSection(every=self.every, keep=self.keep, off_host=self.apart, hf=False),
        )
        spans = tuple(Span(i, self.stages, i, i + 1) for i in range(self.stages))
        return Manifest(config, spans, 8, VOCAB, "the model")

    def rollouts(self, number: int, version: int = 0) -> RolloutBatch:
        """What a batch holds is a function of its number."""
        draw = random.Random(f"rollouts {self.seed} {number}")
        completions = []
        for prompt in range(4):
            ids = [draw.randrange(3, VOCAB) for _ in range(2)]
            settled = draw.random() < 0.25  # no signal
            for i in range(2):
                text = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 3))]
                reward = 1.0 if settled else float(i)
                completions.append(Completion(prompt, ids, text, [-1.0] * len(text), reward, False))
        return RolloutBatch(number, version, 2, completions)
