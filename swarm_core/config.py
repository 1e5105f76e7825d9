"""The run file: read from TOML, checked, handed on as JSON with a digest. No torch, no network, no clock.

One `RunConfig` says everything that its user decides about a run. It comes from three places that give the same object:
a run file (`load`), `--set section.knob=value` strings on top of it (`parse_overrides`), and the JSON that travels inside
the anchor's manifest (`RunConfig.canonical_json` out, `parse_manifest` in). Mistakes become a one-line `ConfigError` that
names file, knob, what was got, what was wanted and the nearest known knob. The knobs are declared in `swarm_core.knobs`.

`python -m swarm_core.config` prints the table in `docs/knobs.md`. In TOML there is no null: a knob whose range ends in
`or "none"` is switched off with the word "none".
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from swarm_core.knobs import (
    AnchorSection,
    CheckpointSection,
    ConfigError,
    CorrectionsSection,
    DataSection,
    DggSection,
    GrpoSection,
    LinksSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    SamplerSection,
    Section,
    SwarmSection,
    is_optional,
    members,
)

__all__ = [
    "ConfigError",
    "RunConfig",
    "knob_table",
    "load",
    "parse_manifest",
    "parse_overrides",
]


class RunConfig(Section):
    """All sections of the run file. Immutable; nothing in it was derived from the model or the data."""

    run: RunSection = RunSection()
    model: ModelSection
    swarm: SwarmSection = SwarmSection()
    data: DataSection
    grpo: GrpoSection = GrpoSection()
    dgg: DggSection = DggSection()
    optimizer: OptimizerSection = OptimizerSection()
    links: LinksSection = LinksSection()
    anchor: AnchorSection = AnchorSection()
    corrections: CorrectionsSection = CorrectionsSection()
    sampler: SamplerSection = SamplerSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        for key, message, got, wanted in _contradictions(self):
            raise PydanticCustomError(
                "contradiction", "{key}: {text}", {"key": key, "text": message, "got": got, "wanted": wanted}
            )
        return self

    def canonical_json(self) -> str:
        """One line of ASCII JSON: sorted keys, no spaces, every knob, so that the same config is the same bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_toml(self) -> str:
        """A run file with every knob, which `load` reads back as this config from whatever folder it lies in."""
        lines = []
        for section, knobs in self.model_dump(mode="json").items():
            lines += [f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in knobs.items()), ""]
        return "\n".join(lines)

    def digest(self) -> str:
        """sha256 of `canonical_json`, as 64 hex digits: of every knob, paths and names included."""
        return hashlib.sha256(self.canonical_json().encode("ascii")).hexdigest()


def _toml(value: Any) -> str:
    # JSON writes strings, numbers, booleans and lists of them as TOML does.
    return json.dumps("none" if value is None else value, ensure_ascii=False)


def _contradictions(c: RunConfig) -> Iterator[tuple[str, str, str, str]]:
    """(key, message, got, wanted) of knobs that are each in range and yet do not go together."""
    stages, split, ticks = c.swarm.stages, c.swarm.split, c.run.ticks
    if split is not None and len(split) != stages:
        yield "swarm.split", "one number a stage is needed", f"{len(split)} numbers", f"{stages}, as swarm.stages says"
    if c.grpo.prompts_per_batch % c.grpo.ticks_per_pass:
        wanted = f"a multiple of grpo.ticks_per_pass = {c.grpo.ticks_per_pass}"
        yield "grpo.prompts_per_batch", "a batch is cut into equal slices", str(c.grpo.prompts_per_batch), wanted
    lifetime, stale = c.grpo.ticks_per_pass * c.grpo.max_reuse, c.grpo.max_staleness
    if c.sampler.overlap and stale is not None and stale < lifetime:
        wanted = f"{lifetime} or more (ticks_per_pass x max_reuse), or sampler.overlap = false"
        yield "grpo.max_staleness", "with overlap every batch would be dropped as too old", str(stale), wanted
    if c.run.precision == "fp64" and c.links.kind != "identity":
        yield (
            "run.precision",
            "fp64 crosses no lossy link",
            f'fp64 with links.kind = "{c.links.kind}"',
            '"identity" links',
        )
    if 0 < c.links.outliers < 1:
        yield (
            "links.outliers",
            "half of all tokens are above their median",
            str(c.links.outliers),
            "0 (off), or 1 or more",
        )
    for name in ("bytes_per_token", "target_share"):
        steered = c.anchor.q_cadence > 0 and c.anchor.q_source == "stage_sketch" and c.links.kind == "lowrank"
        if getattr(c.links, name) is not None and not steered:
            got = (
                f"{getattr(c.links, name)} with anchor.q_cadence = {c.anchor.q_cadence}, "
                f'q_source = "{c.anchor.q_source}", links.kind = "{c.links.kind}"'
            )
            yield (
                f"links.{name}",
                "only new basis versions from sketches can be steered",
                got,
                'q_cadence >= 1, "stage_sketch" and "lowrank", or none',
            )
    yield from _anchor_contradictions(c)
    if c.optimizer.schedule != "constant" and ticks == 0:
        got = f'"{c.optimizer.schedule}" with run.ticks = 0'
        yield "optimizer.schedule", "a schedule needs a last tick", got, '"constant", or run.ticks >= 1'
    if ticks and c.optimizer.warmup_ticks > ticks:
        wanted = f"at most run.ticks = {ticks}"
        yield "optimizer.warmup_ticks", "warmup outlasts the run", str(c.optimizer.warmup_ticks), wanted
    if c.sampler.engine == "replay" and c.sampler.replay is None:
        yield "sampler.replay", 'sampler.engine = "replay" needs recorded rollouts', "none", "the path of a recording"
    if c.sampler.engine != "replay" and c.sampler.replay is not None:
        wanted = 'sampler.engine = "replay", or no sampler.replay'
        yield "sampler.replay", "a recording is given that nobody reads", f'engine "{c.sampler.engine}"', wanted
    if c.sampler.engine == "replay" and c.sampler.record:
        yield "sampler.record", "a replay is recorded already", "true", 'false, or sampler.engine = "hf"'


def _anchor_contradictions(c: RunConfig) -> Iterator[tuple[str, str, str, str]]:
    a, merger = c.anchor, c.corrections.merger
    if c.corrections.form == "sign" and merger == "held_delta":
        yield (
            "corrections.form",
            "a sign has no size to add",
            '"sign" with merger "held_delta"',
            '"lowrank", "topk" or "bf16"',
        )
    if a.q_source == "anchor_replay" and merger == "none":
        yield (
            "anchor.q_source",
            "without a merger nothing is replayed",
            '"anchor_replay"',
            'a corrections.merger, or "stage_sketch"',
        )
    if a.latency_range[0] > a.latency_range[1]:
        yield "anchor.latency_range", "least and most, in this order", str(a.latency_range), "[least, most]"
    if (a.latency == "trace") != (a.latency_trace is not None):
        got = f'latency "{a.latency}", latency_trace {a.latency_trace or "none"}'
        yield "anchor.latency_trace", "a trace and latency = trace go together", got, "both, or neither"
    least = {"fixed": a.delay_k, "uniform": a.latency_range[0]}.get(a.latency, 1)
    if merger != "none" and least > c.corrections.k_max:
        got, wanted = f"k_max {c.corrections.k_max}, ages from {least} ticks on", "a larger k_max, or a smaller latency"
        yield "corrections.k_max", "every correction would be dropped as too old", got, wanted
    if not a.pin_basis and c.links.reuse_deltas and c.links.kind == "lowrank":
        got = "false with links.reuse_deltas = true"
        yield "anchor.pin_basis", "reuse deltas refer to one basis", got, "true, or links.reuse_deltas = false"


# ---- reading -------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The run file at `path`, with `overrides` such as {"grpo.max_reuse": "1"} on top.

    Relative paths, those in overrides too, are taken from the run file's folder and made absolute. `model.path` is left
    alone when it names no folder there and looks like a hub name (`name` or `owner/name`). Raises `ConfigError`.
    """
    try:
        raw: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", f"cannot read the run file ({error.strerror})", wanted="a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            path, "", f"not TOML: {error}", wanted="UTF-8 text with [sections] and key = value"
        ) from error
    for key, text in (overrides or {}).items():
        section, _, name = key.partition(".")
        known = RunConfig.model_fields.get(section)
        if known is None or name not in _fields(section):
            raise ConfigError("--set", key, "unknown knob", got=repr(text), nearest=_nearest(section, name))
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table[name] = _override_value(section, name, text)
    _resolve_paths(raw, Path(os.path.abspath(path)).parent)
    return _validate(raw, str(path), set(overrides or {}))


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """["grpo.max_reuse=1", ...] from the command line as {"grpo.max_reuse": "1"}; the last one of a key wins."""
    overrides = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or "." not in key:
            raise ConfigError("--set", "", "not an override", got=repr(item), wanted="section.knob=value")
        overrides[key.strip()] = text.strip()
    return overrides


def parse_manifest(text: str | bytes, source: str = "manifest") -> RunConfig:
    """The config whose `canonical_json` is `text`; paths stay as they are. Raises `ConfigError` with path `source`."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(source, "", f"not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(source, "", "not a manifest", got=_shown(raw), wanted="a JSON object of sections")
    return _validate(raw, source, set())


def _validate(raw: dict[str, Any], source: str, overridden: set[str]) -> RunConfig:
    # An absent required section is read as an empty one, so that the error names the knob that is missing.
    raw = {name: {} for name, field in RunConfig.model_fields.items() if field.is_required()} | raw
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        # A misspelt knob first: that a required one is missing is then only its consequence.
        mistakes = sorted(error.errors(include_url=False), key=lambda mistake: mistake["type"] != "extra_forbidden")
        # One wrong value of a union is reported once for every member.
        more = len({mistake["loc"][:2] for mistake in mistakes}) - 1
        raise _readable(mistakes[0], source, overridden, more) from None


def _readable(mistake: ErrorDetails, source: str, overridden: set[str], more: int) -> ConfigError:
    """pydantic's account of a mistake, in our words."""
    if mistake["type"] == "contradiction":
        facts = mistake["ctx"]
        where = "--set" if facts["key"] in overridden else source
        return ConfigError(where, facts["key"], facts["text"], got=facts["got"], wanted=facts["wanted"], more=more)
    section, name = ([str(part) or '""' for part in mistake["loc"]] + [""])[:2]
    key = f"{section}.{name}" if name else section
    got = _shown(mistake["input"])
    if mistake["type"] == "extra_forbidden":
        what = "unknown knob" if name else "unknown section"
        return ConfigError(source, key, what, got=got, nearest=_nearest(section, name), more=more)
    if not name:
        return ConfigError(source, key, "not a section", got=got, wanted=f"[{section}] with its knobs", more=more)
    field = _fields(section)[name]
    where = "--set" if key in overridden else source
    if mistake["type"] == "missing":
        return ConfigError(where, key, "missing", wanted=f"{_range(field)}: {field.description}", more=more)
    item = f", item {mistake['loc'][-1]}" if isinstance(mistake["loc"][-1], int) else ""
    return ConfigError(where, key, "not a possible value" + item, got=got, wanted=_range(field), more=more)


def _fields(section: str) -> dict[str, FieldInfo]:
    kind = RunConfig.model_fields[section].annotation
    assert isinstance(kind, type) and issubclass(kind, Section)
    return kind.model_fields


def _nearest(section: str, name: str) -> str | None:
    """The known key closest to `section.name`: the same name elsewhere, then a likely misspelling."""
    sections = list(RunConfig.model_fields)
    if not name:
        homes = [s for s in sections if section in _fields(s)]  # a knob written above the first [section]
        if homes:
            return f"{homes[0]}.{section}"
        close = difflib.get_close_matches(section, sections, n=1)
        return f"[{close[0]}]" if close else None
    homes = [s for s in sections if name in _fields(s)]
    if homes:
        best = difflib.get_close_matches(section, homes, n=1, cutoff=0.0)
        return f"{best[0]}.{name}"
    if section in sections:
        close = difflib.get_close_matches(name, list(_fields(section)), n=1)
        if close:
            return f"{section}.{close[0]}"
    everything = [f"{s}.{known}" for s in sections for known in _fields(s)]
    close = difflib.get_close_matches(f"{section}.{name}", everything, n=1)
    return close[0] if close else None


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _override_value(section: str, name: str, text: str) -> Any:
    """The text after `=` as a TOML value; strings need no quotes, and True and False may be written as in Python."""
    kinds = members(_fields(section)[name].annotation)
    if all(m in (str, Path, type(None)) or get_origin(m) is Literal for m in kinds):
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
    if bool in kinds:
        text = text.lower()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    for section, table in raw.items():
        if section not in RunConfig.model_fields or not isinstance(table, dict):
            continue
        for name, field in _fields(section).items():
            value, is_path = table.get(name), Path in members(field.annotation)
            if not isinstance(value, str) or not value or (is_path and value == "none" and is_optional(field)):
                continue
            absolute = os.path.abspath(folder / os.path.expanduser(value))
            hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", value) and not os.path.isdir(absolute)
            if is_path or ((section, name) == ("model", "path") and not hub_name):
                table[name] = absolute


# ---- the knob table ------------------------------------------------------------------------------------------------


def _range(field: FieldInfo) -> str:
    """What a knob may be, in words: `whole number >= 1`, `"a" | "b"`, `true | false`, ..."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    text = str(extra.get("range") or "")
    if not text:
        kind = members(field.annotation)[0]
        if get_origin(kind) is Literal:
            text = " | ".join(f'"{choice}"' for choice in get_args(kind))
        else:
            text = {bool: "true | false", int: "whole number", float: "number", str: "text"}[kind]
        signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        limits = [
            f"{s} {getattr(m, n):g}" if abs(getattr(m, n)) < 1e6 else f"{s} {getattr(m, n)}"
            for m in field.metadata
            for n, s in signs
            if hasattr(m, n)
        ]
        text = " ".join([text, ", ".join(limits)]).strip()
    return text + (', or "none"' if is_optional(field) else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    return json.dumps("none" if field.default is None else field.default)


def knob_table() -> str:
    """The text of `docs/knobs.md`: one table a section with default, unit, range and what the knob does."""
    lines = ["# Knobs", "", "Generated by `make knobs` from `swarm_core/knobs.py`; do not edit.", ""]
    lines += ["Every knob of a run file. All can be set on the command line too: `--set grpo.max_reuse=1`."]
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        lines += ["", f"## [{section}]", "", str(kind.__doc__), ""]
        lines += ["| knob | default | unit | range | what it does |", "|---|---|---|---|---|"]
        for name, known in _fields(section).items():
            extra = known.json_schema_extra if isinstance(known.json_schema_extra, dict) else {}
            cells = [f"`{name}`", f"`{_default(known)}`", str(extra.get("unit", "")), _range(known), known.description]
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(knob_table())
