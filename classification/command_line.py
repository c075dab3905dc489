"""From a recipe and the command line to a checked `Config`."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import reprlib
import types
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hvt_backbones import InputError
from hvt_backbones.errors import ArgumentParser, nearest

from .checks import check_names, check_paths
from .config import Config

QUOTES = "'\""
PATHS = {"data.dir", "output.dir", "output.resume", "model.pretrained", "model.class_map"}
RECIPES = Path(__file__).parent / "recipes"
# Each section's class, and each setting's field and type under its full key ("optimizer.lr").
SECTIONS: dict[str, type] = get_type_hints(Config)
FIELDS: dict[str, Field] = {f"{name}.{entry.name}": entry for name, cls in SECTIONS.items() for entry in fields(cls)}
TYPES: dict[str, Any] = {
    f"{name}.{key}": hint for name, cls in SECTIONS.items() for key, hint in get_type_hints(cls).items()
}
FLAGS: dict[str, str] = {entry.metadata["flag"]: key for key, entry in FIELDS.items() if entry.metadata["flag"]}


def describe(hint: Any) -> str:
    """A type as the user reads it: "number", "true or false", "list of integers"."""
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {describe(get_args(hint)[0])}s"
    if get_origin(hint) is dict:
        return "mapping"
    return {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}[hint]


def describe_setting(key: str) -> str:
    """All that a setting accepts: "integer of at least 1 and at most 100000", "list of 3 integers"."""
    limits, accepted = FIELDS[key].metadata["limits"], describe(TYPES[key])
    if limits["length"] is not None:
        accepted = accepted.replace("list of", f"list of {limits['length']}")
    bounds = describe_limits(key)
    return f"{accepted}, {bounds}" if bounds else accepted


def describe_limits(key: str) -> str:
    words = {"above": "more than", "low": "at least", "high": "at most"}
    limits = FIELDS[key].metadata["limits"]
    return " and ".join(f"{text} {limits[name]:.7g}" for name, text in words.items() if limits[name] is not None)


def shown(value: Any) -> str:
    """`value` in a message: on one line and short, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # more digits than Python writes out
        return "a huge number"


def convert(value: Any, hint: Any) -> Any:
    """`value`, from YAML or a command line, as the type `hint`; `ValueError` where it is not one."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for part in sorted(get_args(hint), key=lambda part: part is str):  # text takes anything, so it comes last
            try:
                return convert(value, part)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if value is False and "no" in get_args(hint):  # YAML reads a bare `no` as false
            return "no"
        if value not in get_args(hint):
            raise ValueError
        return value
    if hint is str:
        # no path or name has control characters, and files do not take half a surrogate pair
        if not isinstance(value, str) or not value.strip() or {"Cc", "Cs"} & set(map(unicodedata.category, value)):
            raise ValueError
        return value
    if isinstance(value, str):
        if hint is type(None) and value not in ("null", "~"):  # YAML reads empty text as null too
            raise ValueError
        # YAML 1.1 takes 1e-3 for text, because it has no point
        value = float(value) if hint is float else parse_yaml(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(convert(item, get_args(hint)[0]) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError
    if hint is float and not math.isfinite(value):
        raise ValueError
    return value


def check_setting(key: str, value: Any) -> Any:
    """The value of one setting, converted and within its limits."""
    hint, limits = TYPES[key], FIELDS[key].metadata["limits"]
    try:
        converted = convert(value, hint)
    except (ValueError, OverflowError):
        raise InputError(f"{key}: expected {describe_setting(key)}, got {shown(value)}.") from None
    if converted is None:
        return None
    items = converted if isinstance(converted, tuple) else (converted,)
    if limits["length"] not in (None, len(items)):
        raise InputError(f"{key}: expected {limits['length']} values, got {len(items)}: {shown(value)}.")
    for item in items:
        if (
            (limits["low"] is not None and item < limits["low"])
            or (limits["high"] is not None and item > limits["high"])
            or (limits["above"] is not None and item <= limits["above"])
        ):
            raise InputError(f"{key}: must be {describe_limits(key)}, got {shown(item)}.")
    return converted


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
        values[section][name] = check_setting(key, value)
    for key, entry in FIELDS.items():
        if entry.default is MISSING and entry.default_factory is MISSING and key not in settings:
            raise InputError(f"{key}: missing; expected {describe_setting(key)} ({entry.metadata['help']}).")
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    check_names(config)
    return config


def _nearest_setting(key: str) -> str:
    section, _, name = key.rpartition(".")
    same_name = [known for known in FIELDS if known.split(".")[1] == name]
    close = same_name or difflib.get_close_matches(key, list(FIELDS), n=3, cutoff=0.7)
    question = f"did you mean {' or '.join(close)}? " if close else ""
    takes = ", ".join(entry.name for entry in fields(SECTIONS[section])) if section in SECTIONS else None
    return question + (
        f"expected in {section}: {takes}." if takes else f"expected SECTION.KEY of {', '.join(SECTIONS)}."
    )


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
        raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from None
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
    settings = {}
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
    """A parser that knows every setting; its values stay text, `check_setting` reads them."""
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
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            note = "required" if default is MISSING else f"default {_as_yaml(default)}"
            group.add_argument(
                f"--{key}",
                *([flags[key]] if key in flags else []),
                dest=key,
                default=argparse.SUPPRESS,
                metavar="V",
                help=f"{entry.metadata['help']} [{describe(TYPES[key])}; {note}]".replace("%", "%%"),
                # a switch needs no value: --overwrite
                **({"nargs": "?", "const": "true"} if TYPES[key] is bool else {}),
            )
    return parser


def _as_yaml(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
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
    overrides = _model_overrides(unknown)
    if overrides:
        settings["model.overrides"] = check_setting("model.overrides", settings.get("model.overrides", {})) | overrides
    settings.setdefault("output.dir", f"outputs/{recipe.stem}")
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
        value = value if equals else next(words, None)
        if value is None:
            raise InputError(f"{option}: expected a value.")
        try:
            overrides[option.removeprefix(prefix)] = parse_yaml(value)
        except ValueError:
            raise InputError(f"{option}: expected a YAML value such as 48 or '[2, 2]', got {value!r}.") from None
    return overrides


def _nearest_option(option: str) -> str:
    key = option.removeprefix("--").replace("-", "_")
    return (
        _nearest_setting(key)
        if key.split(".")[-1] in {name.split(".")[1] for name in FIELDS}
        else nearest(option, [*FLAGS, *(f"--{name}" for name in FIELDS)])
    )
