"""The run manifest: what a run file may say, what is refused in which words, and that a config survives its trip."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from swarm_core.config import ConfigError, RunConfig, knob_table, load, parse_manifest, parse_overrides

MINIMAL = '[model]\npath = "owner/name"\n[data]\ntrain = "train.jsonl"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, overrides: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_two_lines_are_a_run_and_the_rest_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    assert (config.run.seed, config.run.ticks, config.run.precision, config.run.threads) == (0, 200, "auto", 1)
    assert (config.swarm.stages, config.swarm.split, config.swarm.microbatch_size) == (3, None, 32)
    assert (config.grpo.prompts_per_batch, config.grpo.completions_per_prompt) == (32, 8)
    assert (config.grpo.ticks_per_pass, config.grpo.max_reuse, config.grpo.loss) == (2, 4, "dapo")
    assert (config.grpo.sampler_correction_cap, config.grpo.dual_clip) == (2.0, None)
    assert (config.dgg.enabled, config.dgg.tau, config.dgg.window) == (True, 0.5, 20)
    assert (config.links.kind, config.links.backward, config.links.zstd) == ("lowrank", "straight_through", "auto")
    assert (config.anchor.q_cadence, config.sampler.engine, config.checkpoint.keep) == (20, "hf", 2)
    # Defaults are not validated when they are filled in, so do it here.
    assert RunConfig.model_validate(config.model_dump()) == config


def test_staleness_limit_is_derived_unless_given(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL)).grpo.staleness_limit == 2 * 2 * 4
    assert load(write(tmp_path, MINIMAL), {"grpo.ticks_per_pass": "4"}).grpo.staleness_limit == 2 * 4 * 4
    assert load(write(tmp_path, MINIMAL + "[grpo]\nmax_staleness = 9\n")).grpo.staleness_limit == 9


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        config.grpo.max_reuse = 1
    with pytest.raises(ValidationError):
        config.grpo = config.grpo


# ---- mistakes, in words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[grpo]\nmax_reuze = 1\n", "grpo.max_reuze", "grpo.max_reuse"),
        ("[grpo]\ntau = 1.0\n", "grpo.tau", "dgg.tau"),
        ("[grpoo]\nmax_reuse = 1\n", "grpoo", "[grpo]"),
        ("[checkpoint]\nlearning_rate_of_the_thing = 1\n", "checkpoint.learning_rate_of_the_thing", None),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(
    tmp_path: Path, text: str, key: str, nearest: str | None
) -> None:
    error = refused(tmp_path, MINIMAL + text)
    assert (error.key, error.nearest) == (key, nearest)
    assert str(error).startswith(f"{tmp_path / 'run.toml'}: {key}: unknown ")
    assert nearest is None or f"did you mean {nearest}?" in str(error)


def test_a_knob_above_the_first_section_is_sent_home(tmp_path: Path) -> None:
    assert refused(tmp_path, "max_reuse = 1\n" + MINIMAL).nearest == "grpo.max_reuse"


@pytest.mark.parametrize(
    ("text", "key", "got", "wanted"),
    [
        ('[grpo]\nmax_reuse = "four"\n', "grpo.max_reuse", '"four"', "whole number >= 1"),
        ("[grpo]\nmax_reuse = 0\n", "grpo.max_reuse", "0", "whole number >= 1"),
        ("[grpo]\nmax_reuse = 2.0\n", "grpo.max_reuse", "2.0", "whole number >= 1"),
        ("[run]\nticks = true\n", "run.ticks", "true", "whole number >= 0"),
        ("[optimizer]\nbeta1 = 1.0\n", "optimizer.beta1", "1.0", "number >= 0, < 1"),
        ("[optimizer]\nlr = nan\n", "optimizer.lr", "NaN", "number >= 0"),
        ("[optimizer]\nmax_grad_norm = inf\n", "optimizer.max_grad_norm", "Infinity", "number > 0"),
        ("[grpo]\ndual_clip = 1.0\n", "grpo.dual_clip", "1.0", 'number > 1, or "none"'),
        ('[dgg]\nenabled = "yes"\n', "dgg.enabled", '"yes"', "true | false"),
        ('[run]\ndevice = "gpu"\n', "run.device", '"gpu"', '"auto" | "cpu" | "cuda"'),
        ('[run]\nname = "../x"\n', "run.name", '"../x"', "letters, digits, . _ -; 64 at most"),
        ('[run]\nname = "x\\n"\n', "run.name", '"x\\n"', "letters, digits, . _ -; 64 at most"),
        ('[sampler]\nreplay = ""\n', "sampler.replay", '""', 'file or folder, or "none"'),
        ("[swarm]\nstages = 2\nsplit = [3, 0]\n", "swarm.split", "0", "list of whole numbers >= 1"),
        ("grpo = 3\n", "grpo", "3", "[grpo] with its knobs"),
    ],
)
def test_an_impossible_value_says_what_was_got_and_what_is_wanted(
    tmp_path: Path, text: str, key: str, got: str, wanted: str
) -> None:
    text = text + MINIMAL if text.startswith("grpo =") else MINIMAL + text
    error = refused(tmp_path, text)
    assert (error.key, error.got) == (key, got)
    assert error.wanted is not None and error.wanted.startswith(wanted)
    assert f"got {got}; wanted {wanted}" in str(error)


@pytest.mark.parametrize("rank", ["0", "-3", "0.0", "1.5", "-0.1", "true", '"many"', "nan"])
@pytest.mark.parametrize("name", ["rank_forward", "rank_backward"])
def test_impossible_ranks(tmp_path: Path, name: str, rank: str) -> None:
    error = refused(tmp_path, MINIMAL + f"[links]\n{name} = {rank}\n")
    assert (error.key, error.more) == (f"links.{name}", 0)


@pytest.mark.parametrize("name", ["exact-integer", "pkg.mod", "pkg:", ":f", "a b", "pkg:f:g"])
def test_impossible_reward_names(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, MINIMAL + f'reward = "{name}"\n').key == "data.reward"


@pytest.mark.parametrize("name", ["exact_integer", "gsm8k", "my_rewards.math:score"])
def test_possible_reward_names(tmp_path: Path, name: str) -> None:
    assert load(write(tmp_path, MINIMAL + f'reward = "{name}"\n')).data.reward == name


def test_missing_knobs_are_named_even_without_their_section(tmp_path: Path) -> None:
    error = refused(tmp_path, "")
    assert (error.key, error.message, error.more) == ("model.path", "missing", 1)
    assert "hub name" in str(error) and str(error).endswith("(and 1 more mistake)")
    # The misspelling comes first: what is missing is only its consequence.
    error = refused(tmp_path, '[model]\npaht = "x"\n[data]\ntrain = "t"\n')
    assert (error.key, error.nearest) == ("model.paht", "model.path")


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("[swarm]\nstages = 3\nsplit = [4, 4]\n", "swarm.split", "got 2 numbers; wanted 3"),
        ("[grpo]\nprompts_per_batch = 33\n", "grpo.prompts_per_batch", "multiple of grpo.ticks_per_pass = 2"),
        ("[grpo]\nmax_staleness = 7\n", "grpo.max_staleness", "wanted 8 or more"),
        ('[run]\nprecision = "fp64"\n', "run.precision", '"identity" links'),
        ('[run]\nticks = 0\n[optimizer]\nschedule = "cosine"\n', "optimizer.schedule", "needs a last tick"),
        ("[run]\nticks = 5\n[optimizer]\nwarmup_ticks = 6\n", "optimizer.warmup_ticks", "at most run.ticks = 5"),
        ('[sampler]\nengine = "replay"\n', "sampler.replay", "needs recorded rollouts"),
        ('[sampler]\nreplay = "x"\n', "sampler.replay", "nobody reads"),
        ('[sampler]\nengine = "replay"\nreplay = "x"\nrecord = true\n', "sampler.record", "recorded already"),
    ],
)
def test_knobs_that_do_not_go_together(tmp_path: Path, text: str, key: str, says: str) -> None:
    error = refused(tmp_path, MINIMAL + text)
    assert error.key == key
    assert says in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "[swarm]\nstages = 2\nsplit = [4, 4]\n",
        "[grpo]\nmax_staleness = 8\n",
        "[grpo]\nmax_staleness = 0\n[sampler]\noverlap = false\n",
        '[run]\nprecision = "fp64"\n[links]\nkind = "identity"\n',
        "[run]\nticks = 0\n[optimizer]\nwarmup_ticks = 6\n",
        '[sampler]\nengine = "replay"\nreplay = "x"\n',
    ],
)
def test_their_neighbours_that_do(tmp_path: Path, text: str) -> None:
    load(write(tmp_path, MINIMAL + text))


def test_files_that_are_no_run_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the run file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot read the run file"):
        load(tmp_path)
    error = refused(tmp_path, "[grpo\n")
    assert "not TOML" in str(error) and "line 1" in str(error)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        load(binary)


# ---- overrides, none, paths ----------------------------------------------------------------------------------------


def test_overrides_win_and_need_no_quotes(tmp_path: Path) -> None:
    overrides = parse_overrides(
        ["grpo.max_reuse=1", "run.name=a=b", "run.name=42", "dgg.enabled=False", "optimizer.lr=1e-4"]
        + ["links.rank_forward=7", "links.rank_backward=0.5", "swarm.split=[1, 2, 3]", 'links.kind="none"']
        + ["grpo.sampler_correction_cap=none", "sampler.eval_every = 0"]
    )
    config = load(write(tmp_path, MINIMAL + "[grpo]\nmax_reuse = 3\n"), overrides)
    assert (config.grpo.max_reuse, config.run.name, config.dgg.enabled, config.optimizer.lr) == (1, "42", False, 1e-4)
    assert (config.links.rank_forward, config.links.rank_backward, config.links.kind) == (7, 0.5, "none")
    assert (config.swarm.split, config.grpo.sampler_correction_cap, config.sampler.eval_every) == ([1, 2, 3], None, 0)


def test_a_wrong_override_is_blamed_and_not_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path, MINIMAL, {"grpo.max_reuse": "0"})
    assert (error.path, error.key, error.got) == ("--set", "grpo.max_reuse", "0")
    error = refused(tmp_path, MINIMAL, {"grpo.max_reuze": "1"})
    assert (error.path, error.nearest) == ("--set", "grpo.max_reuse")
    error = refused(tmp_path, MINIMAL, {"nonsense": "1"})
    assert (error.path, error.key) == ("--set", "nonsense")
    # TOML smuggled in through a value stays a value.
    error = refused(tmp_path, MINIMAL, {"grpo.max_reuse": "1\n[run]\nticks = 3"})
    assert (error.path, error.key) == ("--set", "grpo.max_reuse")


@pytest.mark.parametrize("item", ["grpo.max_reuse", "max_reuse=1", "=", ""])
def test_what_is_no_override(item: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.knob=value"):
        parse_overrides([item])


def test_none_is_a_word_only_where_nothing_is_allowed(tmp_path: Path) -> None:
    text = MINIMAL + 'validation = "none"\n[grpo]\ndual_clip = "none"\n[swarm]\nsplit = "none"\n'
    config = load(write(tmp_path, text))
    assert (config.data.validation, config.grpo.dual_clip, config.swarm.split) == (None, None, None)
    assert refused(tmp_path, MINIMAL + '[grpo]\nmax_reuse = "none"\n').got == '"none"'


def test_relative_paths_are_taken_from_the_run_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "a", tmp_path / "b"
    (folder / "model").mkdir(parents=True)
    elsewhere.mkdir()
    write(folder, '[model]\npath = "model"\n[data]\ntrain = "../train.jsonl"\nvalidation = "/v.jsonl"\n')
    monkeypatch.chdir(elsewhere)
    config = load("../a/run.toml")
    assert config.model.path == str(folder / "model")
    assert (config.data.train, config.data.validation) == (tmp_path / "train.jsonl", Path("/v.jsonl"))
    assert load("../a/run.toml", {"data.train": "x"}).data.train == folder / "x"


@pytest.mark.parametrize(
    ("path", "is_hub_name"),
    [("gpt", True), ("Qwen/Qwen2.5-0.5B", True), ("./gpt", False), ("../a/b", False), ("a/b/c", False), ("/a", False)],
)
def test_what_names_no_folder_may_be_a_hub_name(tmp_path: Path, path: str, is_hub_name: bool) -> None:
    config = load(write(tmp_path, f'[model]\npath = "{path}"\n[data]\ntrain = "t"\n'))
    assert config.model.path == (path if is_hub_name else str((tmp_path / path).resolve()))


# ---- ranks ---------------------------------------------------------------------------------------------------------


def links(tmp_path: Path, text: str) -> Any:
    return load(write(tmp_path, MINIMAL + "[links]\n" + text)).links


def test_ranks_as_numbers_and_as_shares(tmp_path: Path) -> None:
    assert links(tmp_path, "rank_forward = 77\nrank_backward = 154\n").ranks(1536) == (77, 154)
    assert links(tmp_path, "rank_forward = 0.05\nrank_backward = 0.1\n").ranks(1536) == (77, 154)
    # 1 is one column, 1.0 is all of them; a share never rounds to nothing.
    assert links(tmp_path, "rank_forward = 1\nrank_backward = 1.0\n").ranks(96) == (1, 96)
    assert links(tmp_path, "rank_forward = 0.001\nrank_backward = 96\n").ranks(96) == (1, 96)


def test_a_rank_larger_than_the_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"links\.rank_backward: rank larger than the width; got 97; .*width, 96"
    ) as e:
        links(tmp_path, "rank_backward = 97\n").ranks(96)
    assert (e.value.key, e.value.got) == ("links.rank_backward", "97")


@pytest.mark.parametrize("kind", ["none", "identity"])
def test_dense_links_have_the_full_rank(tmp_path: Path, kind: str) -> None:
    assert links(tmp_path, f'kind = "{kind}"\nrank_forward = 500\n').ranks(96) == (96, 96)


# ---- the manifest on its way ---------------------------------------------------------------------------------------


def test_the_manifest_survives_the_trip_and_its_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace("train.jsonl", "tränë.jsonl")
        + "[swarm]\nstages = 2\nsplit = [1, 2]\n[links]\nrank_forward = 7\n"
    )
    config = load(write(tmp_path, text))
    manifest = config.canonical_json()
    again = parse_manifest(manifest)
    assert again == config
    assert again.canonical_json() == manifest
    assert manifest.isascii() and "\n" not in manifest
    assert list(json.loads(manifest)) == sorted(json.loads(manifest))
    assert config.digest() == again.digest() == hashlib.sha256(manifest.encode()).hexdigest()


def test_the_digest_depends_on_values_and_not_on_how_they_were_written(tmp_path: Path) -> None:
    plain = load(write(tmp_path, MINIMAL))
    assert load(write(tmp_path, MINIMAL + "[optimizer]\nmax_grad_norm = 1\n")).digest() == plain.digest()
    assert load(write(tmp_path, MINIMAL), {"optimizer.max_grad_norm": "1.0"}).digest() == plain.digest()
    digests = {load(write(tmp_path, MINIMAL), {"links.rank_forward": rank}).digest() for rank in ("1", "1.0", "2")}
    assert len(digests | {plain.digest()}) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "3", b"\xff", "[" * 100_000, '{"model": 3}', '{"modle": {}}'])
def test_what_is_no_manifest(text: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_manifest(text, source="anchor")
    assert caught.value.path == "anchor"


sections = st.sampled_from([*RunConfig.model_fields, "grpoo", ""])
names = st.sampled_from([n for f in RunConfig.model_fields.values() for n in f.annotation.model_fields])  # type: ignore[union-attr]
values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(
    raw=st.dictionaries(sections, values | st.dictionaries(names | st.text(max_size=5), values, max_size=4), max_size=4)
)
def test_any_document_is_a_config_or_a_one_line_error(raw: dict[str, Any]) -> None:
    raw = {"model": {"path": "m"}, "data": {"train": "t"}} | raw
    try:
        config = parse_manifest(json.dumps(raw))
    except ConfigError as error:
        assert "\n" not in str(error) and error.key
    else:
        assert parse_manifest(config.canonical_json()).digest() == config.digest()


# ---- the table and the import --------------------------------------------------------------------------------------


def test_the_table_has_every_knob_with_a_range_and_a_description() -> None:
    rows = [line for line in knob_table().splitlines() if line.startswith("| `")]
    fields = [field for section in RunConfig.model_fields.values() for field in section.annotation.model_fields.items()]  # type: ignore[union-attr]
    assert len(rows) == len(fields) >= 60
    for row, (name, field) in zip(rows, fields, strict=True):
        cells = row.replace("\\|", "/").strip("| ").split(" | ")
        assert len(cells) == 5 and all(cells[i].strip() for i in (0, 1, 3, 4))
        assert cells[0] == f"`{name}`"
        assert (cells[1] == "`(required)`") == field.is_required()
    assert "| `window` | `20` | ticks | whole number >= 2 |" in knob_table()


def test_importing_it_brings_no_heavy_library() -> None:
    code = "import sys, swarm_core.config; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    assert "pydantic" in loaded
    assert not {"torch", "numpy", "transformers", "grpc", "hivemind", "google"} & set(loaded)


def test_the_toml_of_a_config_reads_back_as_it_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "mödel").mkdir()
    text = MINIMAL.replace("owner/name", "./mödel") + "[swarm]\nsplit = [2, 1, 1]\n[grpo]\ndual_clip = 3.0\n"
    config = load(write(tmp_path / "here", text), {"optimizer.lr": "1e-5", "sampler.overlap": "false"})
    assert load(write(tmp_path / "there", config.to_toml())) == config
