"""From a recipe and the command line to a checked `Config`."""

from __future__ import annotations

import argparse
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from hvt_backbones import InputError
from hvt_backbones.errors import ArgumentParser, nearest

from .checks import check_names, check_paths
from .config import Config

QUOTES = "'\""
PATHS = {"data.dir", "output.dir", "output.resume", "model.pretrained", "model.class_map"}
RECIPES = Path(__file__).parent / "recipes"
SECTIONS: dict[str, type] = get_type_hints(Config)
# the JSON schema of each setting under its full key ("optimizer.lr")
FIELDS: dict[str, dict[str, Any]] = {
    f"{section}.{name}": schema
    for section, cls in SECTIONS.items()
    for name, schema in TypeAdapter(cls).json_schema()["properties"].items()
}
FLAGS = {
    "--data-dir": "data.dir", "--batch-size": "data.batch_size", "--lr": "optimizer.lr", "--epochs": "train.epochs",
    "--seed": "train.seed", "--device": "train.device", "--benchmark-steps": "train.benchmark_steps",
    "--output-dir": "output.dir", "--resume": "output.resume", "--overwrite": "output.overwrite",
    "--allow-changes": "output.allow_changes",
}  # fmt: skip
WORDS = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text", "null": "null"}


def describe(schema: Mapping[str, Any]) -> str:
    """A type as the user reads it: "number", "true or false", "list of integers"."""
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if "anyOf" in schema:
        return " or ".join(map(describe, schema["anyOf"]))
    if schema["type"] == "array":
        return f"list of {describe(schema['items'])}s"
    return WORDS.get(schema["type"], "mapping")


def describe_setting(key: str) -> str:
    """All that a setting accepts: "integer of at least 1 and at most 100000", "list of 3 integers"."""
    schema = FIELDS[key]
    accepted = describe(schema)
    if "minItems" in schema:
        accepted = accepted.replace("list of", f"list of {schema['minItems']}")
    bounds = describe_limits(key)
    return f"{accepted}, {bounds}" if bounds else accepted


def describe_limits(key: str) -> str:
    words = {
        "exclusiveMinimum": "more than", "minimum": "at least", "exclusiveMaximum": "less than", "maximum": "at most"
    }  # fmt: skip
    schema = FIELDS[key]
    limited = schema.get("items") or schema.get("anyOf", [schema])[0]
    return " and ".join(f"{text} {limited[name]:.7g}" for name, text in words.items() if name in limited)


def shown(value: Any) -> str:
    """`value` in a message: on one line and short, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # more digits than Python writes out
        return "a huge number"


def read(value: Any, schema: Mapping[str, Any]) -> Any:
    """`value` of a setting in Python's terms: text is read by the setting's type, and a list becomes a tuple."""
    if isinstance(value, str):
        value = _read_text(value, {part["type"] for part in schema.get("anyOf", [schema])})
    if isinstance(value, list) and "items" in schema:
        return tuple(read(item, schema["items"]) for item in value)
    return value


def _read_text(text: str, types: set[str]) -> Any:
    """As one of the `types` of JSON; what is none of them stays text, for pydantic to refuse."""
    if "null" in types and text in ("null", "~"):  # YAML reads empty text as null too
        return None
    if types & {"string", "boolean"} == {"string"}:
        return text
    try:
        # YAML 1.1 takes 1e-3 for text, because it has no point
        value = float(text) if "number" in types else parse_yaml(text)
    except ValueError:
        return text
    return text if value is None or ("string" in types and not isinstance(value, bool)) else value


def build_config(settings: Mapping[str, Any]) -> Config:
    """A `Config` from full keys ("optimizer.lr") to values of any origin.

    Raises:
        InputError: an unknown or missing key, a wrong type, a value out of its limits, or a contradiction.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in settings.items():
        if key not in FIELDS:
            raise InputError(f"{shown(key).strip(QUOTES)}: unknown setting; {_nearest_setting(key)}")
        section, name = key.split(".")
        values[section][name] = read(value, FIELDS[key])
    sections = {}
    for section, cls in SECTIONS.items():
        try:
            sections[section] = cls(**values[section])
        except ValidationError as error:
            raise InputError(_say(section, error.errors()[0], settings)) from None
    config = Config(**sections)
    check_names(config)
    return config


def _say(section: str, error: ErrorDetails, settings: Mapping[str, Any]) -> str:
    """What pydantic found wrong, as one line."""
    key = f"{section}.{error['loc'][0]}"
    if error["type"] == "missing":
        return f"{key}: missing; expected {describe_setting(key)} ({FIELDS[key]['description']})."
    if error["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{key}: must be {describe_limits(key)}, got {shown(error['input'])}."
    given = shown(settings[key])
    if error["type"] in ("too_short", "too_long"):
        return f"{key}: expected {FIELDS[key]['minItems']} values, got {len(error['input'])}: {given}."
    return f"{key}: expected {describe_setting(key)}, got {given}."


def _nearest_setting(key: str) -> str:
    section, _, name = key.rpartition(".")
    same_name = [known for known in FIELDS if known.split(".")[1] == name]
    question = nearest(key, same_name or list(FIELDS), cutoff=0.0 if same_name else 0.7, otherwise="")
    takes = ", ".join(entry.name for entry in fields(SECTIONS[section])) if section in SECTIONS else None
    expected = f"expected in {section}: {takes}." if takes else f"expected SECTION.KEY of {', '.join(SECTIONS)}."
    return f"{question} {expected}".lstrip()


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name (`digits`) or by path."""
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    raise InputError(f"recipe {name!r} is neither a file nor a shipped recipe; {nearest(path.stem, list(shipped))}")


def parse_yaml(text: str) -> Any:
    """
    Raises:
        ValueError: not YAML; the message is one line, with the place where it is known.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_repeated(node)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ValueError(f"{place}{error.problem}") from None
    except (yaml.YAMLError, TypeError, OverflowError, RecursionError) as error:  # the last: hundreds of brackets
        raise ValueError(" ".join(str(error).split())) from None


def _refuse_repeated(node: yaml.Node | None, above: tuple[str, ...] = ()) -> None:
    """A key that is given twice is a mistake that YAML would pass over, keeping the last."""
    if not isinstance(node, yaml.MappingNode) or len(above) > 3:  # deeper than any setting: an alias of itself
        return
    seen = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            full = (*above, key.value)
            if key.value in seen:
                problem = f"{'.'.join(full)} is given twice; expected each key once"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
            _refuse_repeated(value, full)


def load_recipe(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe file as full keys; not yet checked.

    `base: NAME` in a recipe takes what it does not set itself from another one: a shipped name, or a file beside it. A
    setting replaces that of the base whole, `model.overrides` too. `derived` are the recipes that led here as bases.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read as text ({error}); expected YAML in UTF-8.") from None
    except ValueError as error:
        raise InputError(f"recipe {path}: is not YAML: {error}; expected {', '.join(SECTIONS)}.") from None
    if not isinstance(content, Mapping):
        raise InputError(f"recipe {path}: expected sections ({', '.join(SECTIONS)}), got {type(content).__name__}.")
    settings: dict[str, Any] = {}
    for section, values in content.items():
        if section == "base":
            continue
        if section not in SECTIONS:
            hint = nearest(str(section), ["base", *SECTIONS])
            raise InputError(f"recipe {path}: {shown(section).strip(QUOTES)}: unknown section; {hint}")
        if not isinstance(values, Mapping):
            raise InputError(f"recipe {path}: {section}: expected settings below it, got {shown(values)}.")
        settings |= {f"{section}.{name}": value for name, value in values.items()}
    if "base" not in content:
        return settings
    derived = (*derived, path.resolve())
    base = _find_base(path, content["base"])
    if base.resolve() in derived:
        chain = " -> ".join(link.stem for link in (*derived, base))
        raise InputError(
            f"recipe {path}: base: the bases lead in a circle, {chain}; expected a recipe without this one."
        )
    return load_recipe(base, derived) | settings


def _find_base(path: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise InputError(f"recipe {path}: base: expected the name or file of another recipe, got {shown(name)}.")
    beside = path.parent / name
    try:
        return beside if beside.is_file() else find_recipe(name)
    except (InputError, OSError) as error:
        raise InputError(f"recipe {path}: base: {error}") from None


def build_parser() -> argparse.ArgumentParser:
    """A parser that knows every setting; its values stay text, which `read` reads."""
    parser = ArgumentParser(
        prog="python -m classification.train",
        usage="%(prog)s RECIPE [--key value ...]",
        description="Train an image classifier. RECIPE is a file or a shipped name: "
        + ", ".join(path.stem for path in sorted(RECIPES.glob("*.yaml"))),
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe name or YAML file")
    flags = {key: flag for flag, key in FLAGS.items()}
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section, cls.__doc__)
        for entry in fields(cls):
            key = f"{section}.{entry.name}"
            schema = FIELDS[key]
            note = f"default {_as_yaml(schema['default'])}" if "default" in schema else "required"
            kind, *words = schema.get("anyOf", [schema])
            # needs no value: --overwrite
            switch = kind.get("type") == "boolean" and all("enum" in word for word in words)
            group.add_argument(
                f"--{key}",
                *([flags[key]] if key in flags else []),
                dest=key,
                default=argparse.SUPPRESS,
                metavar="V",
                nargs="?" if switch else None,
                const="true" if switch else None,
                help=f"{schema['description']} [{describe(schema)}; {note}]".replace("%", "%%"),
            )
    return parser


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def parse_command_line(argv: Sequence[str] | None = None) -> Config:
    """The checked configuration of `RECIPE [--key value ...]`; the command line wins over the recipe.

    Raises:
        InputError: anything wrong in the recipe or on the command line, as one line that names the key.
        SystemExit: after `--help`.
    """
    arguments, unknown = build_parser().parse_known_args(argv)
    given = vars(arguments)
    recipe = find_recipe(given.pop("recipe"))
    settings = load_recipe(recipe) | given
    if overrides := _model_overrides(unknown):
        below = read(settings.get("model.overrides", {}), FIELDS["model.overrides"])
        if isinstance(below, dict):  # else it is refused
            settings["model.overrides"] = below | overrides
    if read(settings.get("output.dir"), FIELDS["output.dir"]) is None:
        settings["output.dir"] = f"outputs/{recipe.stem}"
    for key in PATHS & settings.keys():  # a shell does this for arguments, nobody for a recipe
        if isinstance(settings[key], str):
            settings[key] = os.path.expanduser(settings[key])
    config = build_config(settings)
    check_paths(config)
    return config


def _model_overrides(unknown: Sequence[str]) -> dict[str, Any]:
    """`--model.overrides.embed_dim 48` sets one constructor argument; anything else unknown is an error."""
    overrides = {}
    words = iter(unknown)
    for word in words:
        option, equals, value = word.partition("=")
        prefix = "--model.overrides."
        if not option.startswith(prefix):
            if option.startswith("--"):
                raise InputError(f"{option}: unknown option; {_nearest_option(option)}")
            raise InputError(f"{word!r}: unexpected value; options are written --key value, lists as '[1, 2]'.")
        text = value if equals else next(words, None)
        if text is None:
            raise InputError(f"{option}: expected a value.")
        try:
            overrides[option.removeprefix(prefix)] = parse_yaml(text)
        except ValueError:
            raise InputError(f"{option}: expected a YAML value such as 48 or '[2, 2]', got {text!r}.") from None
    return overrides


def _nearest_option(option: str) -> str:
    key = option.removeprefix("--").replace("-", "_")
    return (
        _nearest_setting(key)
        if key.split(".")[-1] in {name.split(".")[1] for name in FIELDS}
        else nearest(option, [*FLAGS, *(f"--{name}" for name in FIELDS)])
    )
