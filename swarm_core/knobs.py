"""Every knob, declared: the sections of a run file with type, default, unit, range and one line of what each does.

Nothing here reads a file: `swarm_core.config` does that, and holds the checks that span sections. No torch. To add a
knob, add one `knob(...)` line below and run `make knobs`.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from swarm_core.errors import UserError

REQUIRED: Any = ...


class ConfigError(UserError):
    """A run file, an override or a manifest that cannot be used; `str()` is one line, fit for the terminal.

    Fields: `path` the file ("--set" for an override), `key` as `section.knob` ("" for the file as a whole), `message`
    what is wrong, `got` and `wanted` as text, `nearest` the known key that was probably meant, `more` how many further
    mistakes the same file has.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: str,
        message: str,
        *,
        got: str | None = None,
        wanted: str | None = None,
        nearest: str | None = None,
        more: int = 0,
    ) -> None:
        self.path, self.key, self.message = str(path), key, message
        self.got, self.wanted, self.nearest, self.more = got, wanted, nearest, more
        line = ": ".join(part for part in (self.path, key, message) if part)
        line += f"; got {got}" if got is not None else ""
        line += f"; wanted {wanted}" if wanted is not None else ""
        line += f"; did you mean {nearest}?" if nearest is not None else ""
        line += f" (and {more} more mistake{'s' if more > 1 else ''})" if more else ""
        super().__init__(" ".join(line.split()))


def members(annotation: Any) -> list[Any]:
    """The types a value may have: `float | None` is [float, NoneType], Annotated is looked through."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def is_optional(field: FieldInfo) -> bool:
    """Whether the knob can be switched off with the word "none"."""
    return type(None) in members(field.annotation)


def knob(default: Any, does: str, *, unit: str = "", range: str = "", **limits: Any) -> Any:
    """A pydantic field with the three things the knob table needs. `range` replaces the text derived from `limits`."""
    extra: dict[str, Any] = {"unit": unit, "range": range}
    return Field(default, description=does, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """One table of the run file: frozen, no unknown keys, no conversions but int to float, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if is_optional(field)}
        return {name: None if name in optional and value == "none" else value for name, value in values.items()}


def _valid_rank(rank: float) -> float:
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError("rank out of range")
    return rank


def _not_empty(path: Any) -> Any:
    if path == "":
        raise ValueError("empty path")  # Path("") would quietly be the working directory
    return path


Rank = Annotated[int | float, AfterValidator(_valid_rank)]
RANK_RANGE = "whole number >= 1, or a share of the width: float, > 0, <= 1"
# TOML knows paths only as strings; a strict pydantic model would refuse them.
FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_not_empty)]


class RunSection(Section):
    """The run as a whole, and what each of its processes computes on."""

    name: str = knob(
        "run",
        "name of the run in logs, metrics and folders",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        range="letters, digits, . _ -; 64 at most",
    )
    seed: int = knob(0, "seed of all generators: data order, sampling, calibration", ge=0, le=2**32 - 1)
    ticks: int = knob(200, "ticks to train; 0 = until stopped", unit="ticks", ge=0)
    device: Literal["auto", "cpu", "cuda"] = knob(
        "auto", "where stages and sampler compute; auto = cuda if there is one"
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = knob(
        "auto",
        "what stages compute in; auto = fp32 on a CPU, bf16 with fp32 master weights on a GPU; fp64 is for tests",
    )
    threads: int = knob(
        1,
        "torch threads of each process; 0 = torch's own choice; 1 while processes outnumber cores",
        unit="threads",
        ge=0,
    )


class ModelSection(Section):
    """The checkpoint that training starts from."""

    path: str = knob(
        REQUIRED, "folder in Hugging Face layout (write ./name), or a hub name", min_length=1, range="folder or name"
    )


class SwarmSection(Section):
    """How the layers are cut into stages, and a tick into microbatches."""

    stages: int = knob(3, "slices the layers are cut into, one worker each", unit="stages", ge=1)
    split: list[Annotated[int, Field(ge=1)]] | None = knob(
        None,
        "layers of each stage, first to last; none = balanced by estimated FLOPs",
        unit="layers",
        range="list of whole numbers >= 1, one a stage",
    )
    microbatch_size: int = knob(32, "sequences that cross a link together", unit="sequences", ge=1)
    logprob_chunk: int = knob(4096, "tokens whose logits exist at the same time on the last stage", unit="tokens", ge=1)


REWARD_RANGE = "name, or package.module:function"


class DataSection(Section):
    """Prompts, answers and the reward. Paths are relative to the run file's folder."""

    train: FilePath = knob(REQUIRED, "training rows, JSONL or parquet: prompt and answer", range="file")
    validation: FilePath | None = knob(None, "rows for the evaluations; none = no evaluation", range="file")
    reward: str = knob(
        "exact_integer", "reward function", pattern=r"^([A-Za-z_]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$", range=REWARD_RANGE
    )
    chat_template: Literal["auto", "off"] = knob(
        "auto", "auto = apply the tokenizer's chat template if it has one; off = prompts as they are"
    )
    verifier_timeout_s: float = knob(5.0, "limit for one reward call; after it the reward is None", unit="s", gt=0)


class GrpoSection(Section):
    """The rollout batch, its reuse, and the loss."""

    prompts_per_batch: int = knob(32, "prompts in a rollout batch (P)", unit="prompts", ge=1)
    completions_per_prompt: int = knob(8, "completions of each prompt, its group (G)", unit="completions", ge=2)
    ticks_per_pass: int = knob(2, "slices, hence ticks, that one pass over a batch takes", unit="ticks", ge=1)
    max_reuse: int = knob(4, "passes over a batch at most; 1 = single use", unit="passes", ge=1)
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = knob("dapo", "what the clipped objective is averaged over")
    clip_low: float = knob(0.2, "importance ratios are clipped below 1 - clip_low", ge=0, le=1)
    clip_high: float = knob(0.2, "importance ratios are clipped above 1 + clip_high", ge=0)
    dual_clip: float | None = knob(None, "bound on the ratio where the advantage is negative", gt=1)
    kl_beta: float = knob(0.0, "weight of the k3 KL to the initial model; 0 = off", ge=0)
    scale_rewards: Literal["group", "none"] = knob("group", "divide advantages by the group's std, or do not")
    ratio_level: Literal["token", "sequence"] = knob(
        "token", "importance ratio of each token, or of the sequence (GSPO)"
    )
    sampler_correction_cap: float | None = knob(
        2.0, "cap of the truncated importance weights trainer/sampler; none = no correction", gt=0
    )
    mask_truncated: bool = knob(False, "leave completions that were cut at the length limit out of the loss")
    temperature: float = knob(1.0, "sampling temperature, also that of all log-probs", gt=0)
    max_completion_length: int = knob(64, "length at which a completion is cut", unit="tokens", ge=1)
    max_staleness: int | None = knob(
        None,
        "rollouts whose weights are older at first use are dropped; none = 2 x ticks_per_pass x max_reuse",
        unit="ticks",
        ge=0,
    )

    @property
    def staleness_limit(self) -> int:
        """`max_staleness`, or what is derived in its place: twice the ticks a fully reused batch lives. Unit: ticks."""
        if self.max_staleness is not None:
            return self.max_staleness
        return 2 * self.ticks_per_pass * self.max_reuse


class DggSection(Section):
    """Dynamic gradient gating of reused batches."""

    enabled: bool = knob(True, "gate reused ticks; off = naive reuse, the score is logged all the same")
    tau: float = knob(0.5, "a reused tick whose score z is above tau is skipped and ends the batch", unit="std", ge=0)
    window: int = knob(20, "increments the score is measured against; no gate before that many", unit="ticks", ge=2)


class OptimizerSection(Section):
    """AdamW, on every stage for its own layers."""

    lr: float = knob(3e-4, "learning rate after warmup", ge=0)
    beta1: float = knob(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = knob(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = knob(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = knob(0.0, "decoupled weight decay", ge=0)
    max_grad_norm: float = knob(1.0, "the whole model's gradient norm is clipped to it", gt=0)
    warmup_ticks: int = knob(0, "ticks over which the learning rate rises from 0", unit="ticks", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = knob("constant", "learning rate from warmup to the last tick")


Quantiser = Literal["uniform", "bf16", "int8", "int4"]


class LinksSection(Section):
    """What crosses the links between stages, and how finely. All but `kind` and the fidelity knobs is for lowrank."""

    kind: Literal["lowrank", "none", "identity"] = knob(
        "lowrank", "lowrank = projected on a basis; none = dense bf16; identity = lossless, for tests"
    )
    # With the uniform step a column that says little costs little, so these are generous: 5 % of width 512 lost twice as
    # much as 9 % (benchmarks/codec.md).
    rank_forward: Rank = knob(
        0.1, "most columns of the activation basis; a model narrower than 512 needs a larger share", range=RANK_RANGE
    )
    rank_backward: Rank = knob(0.12, "most columns of the gradient basis; unused by backward = exact", range=RANK_RANGE)
    fit: Literal["metric", "weighted", "plain"] = knob(
        "metric",
        "activation basis: metric = least loss of the stages behind it; weighted = least error relative to each token's "
        "rms; plain = least error",
    )
    fit_ridge: float = knob(0.03, "fit = metric: added to the metric, as a share of its mean eigenvalue", gt=0, le=10)
    quantiser_forward: Quantiser = knob(
        "uniform", "coefficients of activations: one step for all columns, bf16, or a scale a row"
    )
    quantiser_backward: Quantiser = knob("uniform", "the same of gradients")
    step_forward: float = knob(
        0.25, "quantiser_forward = uniform: its step, in coefficients of a token of rms 1", ge=1 / 64, le=64
    )
    step_backward: float = knob(0.25, "the same of gradients", ge=1 / 64, le=64)
    gradient_scale: Literal["packet", "row"] = knob(
        "packet", "quantiser_backward = uniform: steps relative to the packet's rms, or to each token's"
    )
    stochastic_rounding: bool = knob(False, "quantiser_backward = uniform: round gradients at random, without bias")
    outliers: float = knob(
        16.0, "tokens whose rms is above this many medians travel exactly, outside the fit; 0 = off", ge=0
    )
    reuse_deltas: bool = knob(
        True, "on later passes over a batch only what changed travels (quantiser_forward = uniform)"
    )
    reuse_memory_mb: int = knob(256, "what each end of a link keeps for it, at most", unit="MiB", ge=0)
    share_prompts: bool = knob(True, "the rows of a prompt cross once for all of its completions in a microbatch")
    backward: Literal["straight_through", "exact"] = knob(
        "straight_through", "gradients on a basis of their own, or the true gradient of the compressed network"
    )
    zstd: Literal["auto", "off"] = knob("auto", "auto = zstd where it is measured to pay")
    bytes_per_token: float | None = knob(
        None,
        "steps and ranks are steered to this cost of a row that crosses, a boundary and direction",
        unit="bytes",
        gt=0,
    )
    target_share: float | None = knob(
        None, "ranks are steered to this captured share, a boundary and direction", gt=0, lt=1
    )
    fidelity_every: int = knob(
        0, "ticks between two probes of a few sequences, compressed against dense; 0 = never", unit="ticks", ge=0
    )
    fidelity_sequences: int = knob(8, "sequences of a probe", unit="sequences", ge=1)

    @property
    def steps(self) -> tuple[float, float]:
        """The uniform quantiser's first steps, forward and backward; 0 where another quantiser is used."""
        forward = self.step_forward if self.quantiser_forward == "uniform" else 0.0
        return forward, self.step_backward if self.quantiser_backward == "uniform" else 0.0

    @property
    def shares_prompts(self) -> bool:
        """Whether rows of a prompt cross once for its completions: only where the links are low-rank anyway."""
        return self.share_prompts and self.kind == "lowrank"

    def ranks(self, width: int) -> tuple[int, int]:
        """(rank_forward, rank_backward) as numbers of columns for a hidden width of `width`.

        A share is rounded to the nearest rank, at least 1. Dense links (`none`, `identity`) have ranks equal to the
        width. Raises `ConfigError` for a rank larger than the width.
        """
        if self.kind != "lowrank":
            return width, width
        ranks = []
        for name, rank in (("rank_forward", self.rank_forward), ("rank_backward", self.rank_backward)):
            columns = rank if isinstance(rank, int) else max(1, round(rank * width))
            if columns > width:
                wanted = f"at most the model's hidden width, {width} (or a share such as 0.25)"
                raise ConfigError("", f"links.{name}", "rank larger than the width", got=str(rank), wanted=wanted)
            ranks.append(columns)
        return ranks[0], ranks[1]


class AnchorSection(Section):
    """The slow node: what it refreshes, how often, and how far it lags."""

    q_cadence: int = knob(20, "ticks between two basis refreshes; 0 = keep version 0", unit="ticks", ge=0)
    q_source: Literal["stage_sketch", "anchor_replay"] = knob(
        "stage_sketch",
        "new bases from the stages' running sketches, or from the anchor's own replay of a tick (needs a merger)",
    )
    pin_basis: bool = knob(
        True, "new bases take effect between rollout batches; off = at once, to study what that does"
    )
    calibration_prompts: int = knob(32, "training prompts that version 0 is calibrated on", unit="prompts", ge=1)
    m_cadence: int = knob(
        60, "ticks between two corrections, where corrections.merger asks for any", unit="ticks", ge=1
    )
    latency: Literal["natural", "fixed", "uniform", "lognormal", "trace"] = knob(
        "natural",
        "least age K of a correction: natural = as soon as it is there; fixed = delay_k; uniform, lognormal = drawn for "
        "each; trace = read from latency_trace",
    )
    delay_k: int = knob(5, "latency = fixed: K; lognormal: its median", unit="ticks", ge=1)
    latency_range: list[Annotated[int, Field(ge=1)]] = knob(
        [1, 20],
        "latency = uniform: least and most K",
        unit="ticks",
        range="two whole numbers >= 1",
        min_length=2,
        max_length=2,
    )
    latency_sigma: float = knob(0.5, "latency = lognormal: spread of ln K", ge=0, le=3)
    latency_trace: FilePath | None = knob(
        None, "latency = trace: a file with a K a line, used over and over", range="file"
    )
    slowdown: float = knob(1.0, "a replay takes this many times as long, to study a slow anchor", ge=1)
    snapshot: Literal["auto", "bf16", "exact"] = knob(
        "auto",
        "weights that are shipped to the anchor: auto = rounded to bf16 where a stage computes in it, to TF32 elsewhere; "
        "bf16 = all rounded to bf16; exact = as the stages hold them",
    )
    ring_mb: int = knob(16384, "disk for pairs of weights and rollouts that await their replay", unit="MiB", ge=1)


class CorrectionsSection(Section):
    """What the anchor's dense gradients do to a tick, and how they travel."""

    merger: Literal["none", "signed_ema", "held_delta"] = knob(
        "none", "how a correction is merged into a stage's gradient; none = no snapshots, no replays, no corrections"
    )
    form: Literal["auto", "sign", "lowrank", "topk", "bf16"] = knob(
        "auto", "how corrections travel; auto = sign for signed_ema, lowrank for held_delta"
    )
    rank: int = knob(4, "form = lowrank: columns a matrix", ge=1, le=1024)
    share: float = knob(0.02, "form = topk: entries kept of each tensor", gt=0, le=1)
    alpha: float = knob(0.25, "signed_ema: weight of the stage's own gradient", ge=0, le=1)
    beta_anc: float = knob(0.0, "decay of the mean over old dense gradients; above 0 only to reproduce", ge=0, lt=1)
    age_decay: float = knob(0.88, "held_delta: factor for each tick of age (mu)", ge=0, le=1)
    age_from: Literal["snapshot", "birth"] = knob("snapshot", "held_delta: what age is counted from")
    adaptive_lambda: Literal["ratio", "none"] = knob(
        "ratio", "held_delta: lambda = lambda_cap * min(1, 1/c), c = |delta| / |gradient|, or lambda_cap"
    )
    lambda_cap: float = knob(0.5, "held_delta: largest lambda", ge=0, le=2)
    c_max: float = knob(4.0, "held_delta: a tensor whose c is above it is left alone", gt=0)
    k_max: int = knob(40, "a correction whose snapshot is older is dropped", unit="ticks", ge=0)

    @property
    def wire_form(self) -> Literal["sign", "lowrank", "topk", "bf16"]:
        """`form`, or what `auto` stands for."""
        if self.form != "auto":
            return self.form
        return "sign" if self.merger == "signed_ema" else "lowrank"


class SamplerSection(Section):
    """Who generates the completions, and when the policy is evaluated."""

    engine: Literal["hf", "replay"] = knob("hf", "hf = transformers' generate; replay = rollouts recorded before")
    overlap: bool = knob(True, "generate the next batch while this one trains")
    batch_size: int = knob(256, "sequences in one generate call", unit="sequences", ge=1)
    record: bool = knob(False, "keep all rollouts in the run's folder, for engine = replay")
    replay: FilePath | None = knob(None, "recorded rollouts, needed by engine = replay", range="file or folder")
    eval_every: int = knob(4, "batches between evaluations; 0 = only at the end", unit="batches", ge=0)
    eval_prompts: int = knob(
        256, "validation prompts of an evaluation, or fewer if there are fewer", unit="prompts", ge=1
    )
    eval_samples: int = knob(1, "completions for each evaluation prompt", unit="completions", ge=1)


class CheckpointSection(Section):
    """When the swarm saves itself."""

    every: int = knob(100, "ticks between checkpoints; 0 = at the end and on stop", unit="ticks", ge=0)
    keep: int = knob(2, "newest checkpoints that are kept", unit="checkpoints", ge=1)
    hf: bool = knob(True, "write the model of every checkpoint for transformers, too: a third more bytes")
    off_host: bool = knob(
        True,
        "a stage on another host than the anchor copies its log and its newest shard to the anchor's volume, from which "
        "whoever replaces it begins",
    )
