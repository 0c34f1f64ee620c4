"""Random configurations: valid, or one line that names the field; never another exception, never a file, never slow."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import Config, build, dump_yaml, fields, parse
from engine.config.yaml_io import YamlFile
from engine.errors import UserError

Result = TypeVar("Result")
PATHS = {leaf.path for leaf in fields.walk(Config)}
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    64,
    100,
    512,
    1000,
    1023,
    4096,
    10**9,
    10**30,
    0.5,
    1e-8,
    2.5,
    1e300,
]
ODD = [
    None,
    True,
    False,
    "",
    "x",
    "null",
    "3e-4",
    "off",
    "1_000",
    [],
    [1],
    {},
    {"a": 1},
    float("inf"),
    float("nan"),
    "\x00\x1b",
    "é\n",
]


def good_value(annotation: Any, rng: random.Random) -> Any:
    """A value of the field's type, sensible more often than not."""
    kind = rng.choice(fields.options(annotation))
    if kind is type(None):
        return None
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind is bool:
        return rng.random() < 0.5
    if kind is float:
        return rng.choice([0.0, 1e-4, 1e-3, 0.1, 0.9, 1.0, 10])
    if kind is int:
        return rng.choice([1, 1, 1, 2, 2, 3, 4, 8, 16, 64, 256])
    item = fields.list_item(kind)
    if item is not None:
        return [good_value(item, rng) for _ in range(rng.randrange(3))]
    inner = fields.submodel(kind)
    if inner is not None:
        return section(inner, rng)
    return rng.choice(["a", "runs/b", "none", "auto"])


def section(model: Any, rng: random.Random) -> dict[str, Any]:
    """Some fields of a model: mostly well typed, sometimes not, sometimes misspelt."""
    data: dict[str, Any] = {}
    names = [name for name, info in model.model_fields.items() if info.is_required() or rng.random() < 0.25]
    for name in names:
        dice = rng.random()
        value = good_value(model.model_fields[name].annotation, rng)
        if dice < 0.01:
            value = rng.choice(ODD)
        elif dice < 0.02:
            value = rng.choice(NUMBERS)
        data[name if rng.random() > 0.005 else name[1:] + name[0]] = value
    return data


def outcome(make: Callable[[], Result]) -> Result | str:
    """The configuration or the error's line, within two seconds and without any other exception."""
    result: Any
    start = time.process_time()  # the time of this process: tests share the machine
    try:
        result = make()
    except UserError as error:
        result = str(error)
        assert result
        assert result.isprintable()
        assert len(result) < 1000
    assert time.process_time() - start < 2
    return result


def check(data: dict[str, Any], *, with_yaml: bool) -> bool:
    """One configuration through construction, YAML and the world size; True if it is valid."""
    result = outcome(lambda: build(Config, data))
    if isinstance(result, str):
        assert names_a_field(result, data), result
        return False
    p, m = result.parallel, result.model
    if not result.awaits_model():
        assert m.num_attention_heads % p.tensor == 0
        assert m.num_layers % (p.pipeline * p.virtual_pipeline) == 0
    assert result.train.global_batch_size % result.train.micro_batch_size == 0
    if with_yaml:
        assert build(Config, yaml_round_trip(result)) == result
    if result.awaits_model():
        return True
    fits = p.tensor * p.pipeline * p.context
    for ranks in (fits, 4 * fits, 7):
        size = outcome(partial(result.data_parallel_size, ranks))
        if isinstance(size, str):
            assert size.startswith(("parallel: ", "train.global_batch_size: ", "train.batch_size_schedule."))
        else:
            assert size * fits == ranks
            for step in range(0, 40, 7):
                assert result.train.batch_size_at(step) % (size * result.train.micro_batch_size) == 0
    return True


def names_a_field(message: str, data: dict[str, Any]) -> bool:
    """The line begins with a field's path, or, for a misspelt one, with what stands in the data."""
    return message.startswith(tuple(f"{path}{end}" for path in PATHS for end in (":", "."))) or any(
        message.startswith(f"{name}: unknown field") for name in data
    )


def yaml_round_trip(cfg: Config) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_text(dump_yaml(cfg), encoding="utf-8")
        return YamlFile(path).data


@pytest.mark.parametrize("block", range(4))
def test_ten_thousand_configurations(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    # Writing YAML and reading it again takes thirty times as long as the rest: one in 25.
    valid = sum(
        check(section(Config, random.Random(seed)), with_yaml=seed % 25 == 0)
        for seed in range(2500 * block, 2500 * (block + 1))
    )
    assert 250 < valid < 2250  # neither side is empty
    assert list(tmp_path.iterdir()) == []


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(NUMBERS)
    | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(PATHS)), values, min_size=1, max_size=4))
def test_any_value_in_any_field(changes):
    def make():
        return Config().with_values(changes)

    result = outcome(make)
    if isinstance(result, Config):
        assert build(Config, yaml_round_trip(result)) == result
    else:
        assert names_a_field(result, {}), result


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.builds(
                "--{}={}".format, st.sampled_from(sorted(PATHS)), st.sampled_from(NUMBERS + ODD) | st.text(max_size=10)
            ),
            st.sampled_from([f"--{path}" for path in sorted(PATHS)]),
            st.text(max_size=12),
            st.sampled_from(["--fp8", "--no-fp8", "-1", "--"]),
        ),
        max_size=5,
    )
)
def test_any_command_line(argv):
    argv = [word for word in argv if word not in ("-h", "--help")]
    result = outcome(lambda: parse(Config, argv, prog="p"))
    assert isinstance(result, Config | str)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.text(max_size=60),
        st.binary(max_size=60),
        values.map(lambda value: yaml.safe_dump(value, allow_unicode=True)),
    )
)
def test_any_file(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        result = outcome(lambda: parse(Config, ["--config", str(path)], prog="p"))
        assert isinstance(result, Config) or result.startswith(str(path))
