"""From a recipe and the command line to a checked `Config`."""

from __future__ import annotations

import argparse
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hvt_backbones import InputError
from hvt_backbones.errors import ArgumentParser

from .config import Config

RECIPES = Path(__file__).parent / "recipes"
# Each section's class, and each setting's field and type under its full key ("optimizer.lr").
SECTIONS: dict[str, type] = get_type_hints(Config)
FIELDS: dict[str, Field] = {f"{name}.{entry.name}": entry for name, cls in SECTIONS.items() for entry in fields(cls)}
TYPES: dict[str, Any] = {
    f"{name}.{key}": hint for name, cls in SECTIONS.items() for key, hint in get_type_hints(cls).items()
}
FLAGS: dict[str, str] = {entry.metadata["flag"]: key for key, entry in FIELDS.items() if entry.metadata["flag"]}


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an error message: the names most like `word`, or all of them."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."


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
        if not isinstance(value, str) or not value:
            raise ValueError
        return value
    if isinstance(value, str):
        try:
            # YAML 1.1 takes 1e-3 for text, because it has no point
            value = float(value) if hint is float else yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError from None
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
        raise InputError(f"{key}: expected {describe(hint)}, got {value!r}.") from None
    if converted is None:
        return None
    items = converted if isinstance(converted, tuple) else (converted,)
    if limits["length"] not in (None, len(items)):
        raise InputError(f"{key}: expected {limits['length']} values, got {len(items)}: {value!r}.")
    for item in items:
        for word, bound, holds in (
            ("at least", limits["low"], lambda item, bound: item >= bound),
            ("at most", limits["high"], lambda item, bound: item <= bound),
            ("more than", limits["above"], lambda item, bound: item > bound),
        ):
            if bound is not None and not holds(item, bound):
                raise InputError(f"{key}: must be {word} {bound:g}, got {item:g}.")
    return converted


def build_config(settings: Mapping[str, Any]) -> Config:
    """A `Config` from full keys ("optimizer.lr") to values of any origin.

    Raises:
        InputError: an unknown or missing key, a wrong type, a value out of its limits, or a contradiction.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in settings.items():
        if key not in FIELDS:
            raise InputError(f"{key}: unknown setting; {_nearest_setting(key)}")
        section, name = key.split(".")
        values[section][name] = check_setting(key, value)
    for key, entry in FIELDS.items():
        if entry.default is MISSING and entry.default_factory is MISSING and key not in settings:
            raise InputError(f"{key}: missing; expected {describe(TYPES[key])} ({entry.metadata['help']}).")
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    _check_names(config)
    return config


def _nearest_setting(key: str) -> str:
    same_name = [known for known in FIELDS if known.split(".")[1] == key.split(".")[-1]]
    return f"did you mean {' or '.join(same_name)}?" if same_name else nearest(key, list(FIELDS))


def _check_names(config: Config) -> None:
    """Names that other libraries define: models, optimisers, augmentation policies."""
    import timm.optim
    from timm.data.transforms_factory import create_transform

    from hvt_backbones.variants import find_variant

    find_variant(config.model.name)
    optimizers = timm.optim.list_optimizers()
    if config.optimizer.name not in optimizers:
        hint = nearest(config.optimizer.name, optimizers)
        raise InputError(f"optimizer.name: unknown {config.optimizer.name!r}; {hint}")
    if (policy := config.augmentation.auto_augment) is not None:
        try:
            if policy.split("-")[0] not in ("rand", "augmix", "v0", "v0r", "original", "originalr", "3a"):
                raise ValueError(policy)
            create_transform(32, is_training=True, auto_augment=policy)
        except (AssertionError, ValueError, KeyError, TypeError):
            raise InputError(
                f"augmentation.auto_augment: timm does not know the policy {policy!r}; "
                "expected for example rand-m9-mstd0.5-inc1, augmix-m3-w3 or original."
            ) from None


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name (`digits`) or by path."""
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    raise InputError(f"recipe {name!r} is neither a file nor a shipped recipe; {nearest(path.stem, list(shipped))}")


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe file as full keys; not yet checked."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path}: is not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"recipe {path}: expected sections ({', '.join(SECTIONS)}), got {type(content).__name__}.")
    settings = {}
    for section, values in content.items():
        if section not in SECTIONS:
            raise InputError(f"recipe {path}: {section}: unknown section; {nearest(str(section), list(SECTIONS))}")
        if not isinstance(values, Mapping):
            raise InputError(f"recipe {path}: {section}: expected settings below it, got {values!r}.")
        settings |= {f"{section}.{name}": value for name, value in values.items()}
    return settings


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
    return build_config(settings)


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
            overrides[option.removeprefix(prefix)] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"{option}: expected a YAML value such as 48 or '[2, 2]', got {value!r}.") from None
    return overrides


def _nearest_option(option: str) -> str:
    key = option.removeprefix("--").replace("-", "_")
    return (
        _nearest_setting(key)
        if key.split(".")[-1] in {name.split(".")[1] for name in FIELDS}
        else nearest(option, [*FLAGS, *(f"--{name}" for name in FIELDS)])
    )
