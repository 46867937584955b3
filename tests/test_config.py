"""Configs: strict, every error names field, value and mend, and the two hashes name what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tlite_jax.config import RunConfig
from tlite_jax.config_files import differences, load_config, override, parse, read_yaml, save_config
from tlite_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A valid config as YAML gives it; its files need not exist."""
    return tiny.values(tmp_path, tmp_path / "run")


@pytest.fixture
def file(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    (line,) = str(caught.value).splitlines()
    return line


def test_many_problems_are_still_a_line_that_can_be_read(file: Path) -> None:
    told = refused(file, *(f"mesh.xyz{number}=1" for number in range(30)))
    assert told.count("known here: context, fsdp, replica") == 1
    assert told.count("unknown key") == 10
    assert told.endswith("; and 20 more")


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("optimizer.learning_rat=1e-3", "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("trian.steps=3", "trian: unknown key; did you mean 'train'?"),
        ("mesh.xyzzy=3", "mesh.xyzzy: unknown key; known here: context, fsdp, replica"),
        ("model.rope_scaling={factr: 8.0}", "model.rope_scaling.factr: unknown key; did you mean 'factor'?"),
        ("data.mixture.groups=[{selekt: {}, epochs: 1}]", "groups.0.selekt: unknown key; did you mean 'select'?"),
        ("data.prepare.held_out.max_document=3", "max_document: unknown key; did you mean 'max_documents'?"),
        ("train.batch_size=null", "train.batch_size: Input should be a valid integer (got None)"),
        ("train.batch_size=24.5", "train.batch_size: Input should be a valid integer"),
        ("train.batch_size='24'", "train.batch_size: Input should be a valid integer (got '24')"),
        ("train.batch_size=0", "train.batch_size: Input should be greater than 0 (got 0)"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: Input should be a finite number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: Input should be a valid number (got 'fast')"),
        ("optimizer.beta2=1.0", "optimizer.beta2: Input should be less than 1 (got 1.0)"),
        ("data.document_masking=1", "data.document_masking: should be false, true or best_fit"),
        ("schedule.name=linear", "schedule.name: Input should be 'constant_with_warmup' or 'cosine_with_warmup'"),
        (
            "execution.remat=some",
            "execution.remat: Input should be 'full', 'attention', 'dots', 'offload' or 'none' (got 'some')",
        ),
        ("model.num_key_value_heads=3", "num_attention_heads (2) must be a multiple of num_key_value_heads (3)"),
        ("model.head_dim=5", "head_dim (5) must be even"),
        ("model=null", "give model (its shape, for random weights) or init_from"),
        ("data.tokenizer=null", "give data.tokenizer"),
        ("data.mixture.groups=[{select: {}, share: 0.7}]", "the groups' shares add up to 0.7; make them add up to 1"),
        ("data.mixture.groups=[{select: {}, share: 1.0, epochs: 1.0}]", "give exactly one of share and epochs"),
        ("data.mixture.groups=[]", "data.mixture.groups: Tuple should have at least 1 item"),
        ("init_from={path: x, schedule: reset}", "init_from.optimizer: required, not given"),
        ("train.steps", "override 'train.steps' is not of the form section.field=value"),
        ("=3", "override '=3' is not of the form"),
        ("train.steps.more=3", "override 'train.steps.more=3': 'steps' has no fields"),
        ("train.steps=[1, 2", "override 'train.steps=[1, 2'"),
    ],
)
def test_errors_name_field_value_and_mend(word: str, complaint: str, file: Path) -> None:
    assert complaint in refused(file, word)


def test_all_problems_are_named_at_once_with_their_file(file: Path) -> None:
    line = refused(file, "train.batch_size=-1", "mesh.fsdb=8")
    assert line.startswith(f"{file}: ")
    assert "train.batch_size" in line
    assert "mesh.fsdb: unknown key; did you mean 'fsdp'?" in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 1\nseed: 2\n", "line 2: key 'seed' is given twice"),
        ("train: {steps: 1, steps: 2}\n", "key 'steps' is given twice"),
        ("seed: !!python/object/apply:os.getcwd []\n", "line 1: could not determine a constructor for the tag"),
        ("seed: !own 3\n", "could not determine a constructor for the tag '!own'"),
        ("1: 2\n", "key 1 is not a string"),
        ("seed: [1\n", "expected ',' or ']'"),
        ("- a\n- b\n", "a config is a mapping of sections, this is list"),
        ("", "a config is a mapping of sections, this is NoneType"),
        ("[" * 100_000, "not YAML"),
    ],
)
def test_malformed_yaml_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    line = refused(path)
    assert line.startswith(str(path))
    assert complaint in line


def test_files_that_are_no_configs_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.yaml").endswith("absent.yaml: No such file or directory")
    assert refused(tmp_path).endswith("Is a directory")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert refused(tmp_path / "binary").endswith("not UTF-8 text")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2e3", -2000.0),
        ("1.5e-3", 1.5e-3),
        ("+1_000e2", 1e5),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_numbers_with_exponents_are_numbers(text: str, value: object) -> None:
    assert read_yaml(text, "test") == value


def test_overrides_reach_nested_null_and_list_fields(file: Path) -> None:
    words = [
        "optimizer.learning_rate=1e-5",
        "train.steps=null",
        "model.rope_scaling.factor=8.0",
        "model.rope_scaling.low_freq_factor=1.0",
        "model.rope_scaling.high_freq_factor=4.0",
        "model.rope_scaling.original_max_position_embeddings=64",
        "data.mixture.groups=[{select: {language: ru}, epochs: 1.5}]",
        "data.document_start=null",
        "output=runs/a=b",
        "checkpoint.keep_latest=3",
        "checkpoint.keep_latest=4",
    ]
    config = load_config(file, words)
    assert config.optimizer.learning_rate == 1e-5
    assert config.train.steps is None
    assert config.model.rope_scaling.factor == 8.0
    (group,) = config.data.mixture.groups
    assert (group.select, group.epochs, group.share) == ({"language": "ru"}, 1.5, None)
    assert config.data.document_start is None
    assert config.output == Path("runs/a=b")
    assert config.checkpoint.keep_latest == 4
    assert load_config(file).train.steps == tiny.STEPS


def test_override_validates_again(file: Path) -> None:
    config = load_config(file)
    assert override(config, ["seed=5"]).seed == 5
    assert override(config, []) == config
    with pytest.raises(UserError, match="override: seed: "):
        override(config, ["seed=-1"])


def test_a_config_is_frozen(file: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(file).seed = 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_saving(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert (again.semantic_hash(), again.execution_hash()) == (config.semantic_hash(), config.execution_hash())


def test_saving_keeps_what_yaml_finds_hard(file: Path, tmp_path: Path) -> None:
    words = ["optimizer.eps=1e-20", "data.document_end='yes'", "output=прогоны/1e5", "data.document_start='null'"]
    config = load_config(file, words)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert (config.data.document_end, config.data.document_start) == ("yes", "null")


SEMANTIC = [
    "optimizer.learning_rate=1e-3",
    "optimizer.weight_decay_on=matrices",
    "schedule.warmup_steps=1",
    "train.batch_size=48",
    "seed=7",
    "model.rms_norm_eps=1e-6",
    "data.sequence_length=8",
    "data.document_masking=true",
    "data.mixture.tokens=4096",
    "init_from={path: base, optimizer: reset, schedule: reset}",
]
EXECUTION = ["mesh.replica=2", "mesh.fsdp=4", "execution.remat=full", "execution.compute_dtype=bfloat16"]
NEITHER = ["output=elsewhere", "checkpoint.every=7", "evaluation.every=3", "telemetry.console=true", "train.steps=9"]
NEITHER += ["telemetry.prometheus=run.prom", "telemetry.norms_every=7", "telemetry.norms_every=0"]


@pytest.mark.parametrize("word", [*SEMANTIC, *EXECUTION, *NEITHER])
def test_the_two_hashes_change_with_what_they_name(word: str, values: dict[str, Any]) -> None:
    config = parse(RunConfig, values, "test")
    changed = override(config, [word])
    assert changed != config
    assert (changed.semantic_hash() != config.semantic_hash()) == (word in SEMANTIC)
    assert (changed.execution_hash() != config.execution_hash()) == (word in EXECUTION)


def test_hashes_do_not_depend_on_how_a_config_is_written(values: dict[str, Any]) -> None:
    config = parse(RunConfig, values, "test")
    backwards = dict(reversed(values.items())) | {"mesh": {"replica": 1, "fsdp": None}}
    backwards["optimizer"] = json.loads('{"weight_decay": 0.001, "learning_rate": 0.01, "beta1": 0.9}')
    assert parse(RunConfig, backwards, "test").semantic_hash() == config.semantic_hash()
    assert parse(RunConfig, backwards, "test").execution_hash() == config.execution_hash()


def test_differences_name_nested_fields() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": 1, "same": "x"}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": {"f": 2}, "e": 1.0, "same": "x", "g": True}
    assert differences(old, new) == ["a.c: [1, 2] -> [1, 3]", 'd: null -> {"f": 2}', "e: 1 -> 1.0", "g: null -> true"]


def test_a_carried_cosine_needs_its_length() -> None:
    words = [f"init_from={json.dumps({'path': 'x', 'optimizer': 'carry', 'schedule': 'carry'})}"]
    with pytest.raises(UserError, match=r"carry: give schedule\.total_steps"):
        load_config(CONFIGS / "tiny.yaml", words)
    assert load_config(CONFIGS / "tiny.yaml", [*words, "schedule.total_steps=9"]).schedule.total_steps == 9
