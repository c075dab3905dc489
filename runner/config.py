"""MMEngine's configurations: found by name, read, changed by `--cfg-options`, completed; mistakes in one line."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import inspect
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import build_functions
from mmengine.runner import Runner

from hvt_backbones.errors import InputError, nearest

from . import patches
from .application import ROOT, Application
from .findings import describe
from .parts import complete

# top-level keys beside the Runner's arguments that MMEngine and the commands read
OTHER_KEYS = ("activation_checkpointing", "compile", "efficient_conv_bn_eval", "find_unused_parameters",
              "model_wrapper_cfg", "sync_bn", "tta_model", "tta_pipeline", "work_dir")  # fmt: skip
BRACKETS = {"(": ")", "[": "]", "{": "}"}
ALIKE = 0.85  # in_channels and out_channels are less so


class ConfigOptions(DictAction):
    """MMEngine's KEY=VALUE, with brackets in brackets, and a line that names what is not of this form."""

    _parse_iterable = staticmethod(lambda text: parse_value(text))

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for text in values:
            key, equals, _ = text.partition("=")
            try:
                if not equals or not all(key.split(".")):
                    raise ValueError
                super().__call__(parser, namespace, [text], option_string)
            except (ValueError, SyntaxError, TypeError):  # of keys that are lists
                parser.error(
                    f"--cfg-options {text!r} is not KEY=VALUE, such as model.backbone.with_cp=True or a.b=[(1,2),(3,4)]"
                )


def add_config_arguments(parser: argparse.ArgumentParser, application: Application, nargs: str | None = None) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help=f"a file, or a name of {application.name}/zoo.py")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change the configuration: train_dataloader.batch_size=4 model.backbone.with_cp=True",
    )


def parse_value(text: str) -> Any:
    """What stands behind KEY=: a number, True, None, a word, `[...]`, `(...)`, `{key: value}` or `dict(key=value)`.

    They may hold one another. Words need no quotes, unless they have commas; `1,2` is `[1, 2]`, as MMEngine has it.

    Raises:
        ValueError: brackets or quotes that are not closed.
    """
    parts = _split(text)
    if len(parts) > 1:
        return [_parse_one(part) for part in parts if part.strip()]
    return _parse_one(text)


def _parse_one(text: str) -> Any:
    text = text.strip()
    named = text.startswith("dict(") and text.endswith(")")
    start = "{" if named else text[:1]
    if start and start in "\"'" and len(text) > 1:
        return ast.literal_eval(text)
    if not start or start not in BRACKETS or not text.endswith(")" if named else BRACKETS[start]):
        return DictAction._parse_int_float_bool(text)
    parts = [part for part in _split(text[5:-1] if named else text[1:-1]) if part.strip()]
    if start != "{":
        return (tuple if start == "(" else list)(_parse_one(part) for part in parts)
    pairs = [_split(part, "=" if named else ":", 1) for part in parts]
    return {_parse_one(key): _parse_one(value) for key, value in pairs}


def _split(text: str, separator: str = ",", most: int = -1) -> list[str]:
    """At the separators outside brackets and quotes."""
    parts, begin, closers, quote, before = [], 0, [], "", ""
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and before in ("", *",([{:="):
            quote = char
        elif char in BRACKETS:
            closers.append(BRACKETS[char])
        elif char in BRACKETS.values():
            if not closers or closers.pop() != char:
                raise ValueError(f"a {char} too many")
        elif char == separator and not closers and len(parts) != most:
            parts.append(text[begin:index])
            begin = index + 1
        before = char.strip() or before
    if closers or quote:
        raise ValueError(f"{(closers or [quote])[-1]} is missing")
    return [*parts, text[begin:]]


def open_config(name: str, options: Mapping[str, Any] | None, application: Application) -> Config:
    """The configuration in the file `name`, whose bases may be names too, or of this name, with `options`; completed.

    Raises:
        InputError: no such file, a mistake in it, a key of `options` that it does not have, or the other framework's.
    """
    with patches.named_bases(application.config):
        cfg = _read(name, application)
    path = cfg.filename
    if "model" not in cfg:
        raise InputError(f"config {path} has no model: name a whole configuration, not one of the parts in _base_")
    if cfg.get("default_scope", application.scope) != application.scope:
        raise InputError(f"config {path} is one of {cfg.default_scope}: {application.name} runs {application.scope}")
    for key in options or {}:
        check_key(cfg.to_dict(), key)
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"--cfg-options: {describe(error)}") from error
    necks = cfg.model.get("neck")
    for neck in necks if isinstance(necks, list | tuple) else [necks]:
        if isinstance(neck, Mapping) and isinstance(neck.get("in_channels"), tuple):
            neck["in_channels"] = list(neck["in_channels"])  # FPN asserts a list
    with building(name):
        complete(cfg)
    return cfg


def _read(name: str, application: Application) -> Config:
    """The configuration in the file `name`; else of the name among the application's, with or without `.py`."""
    path = Path(name)
    demos = {file.stem: file for file in (ROOT / application.name / "configs/demo").glob("*.py")}
    if not path.is_file():
        path = demos.get(path.name.removesuffix(".py"), path)
    if not path.is_file():
        if path.parent != Path(".") and path.stem not in application.rows:  # a path, of no configuration before
            raise InputError(f"config {name} does not exist; {nearest(path.stem, list(application.rows))}")
        return application.config(path.name)
    try:
        return Config.fromfile(path)
    except InputError:
        raise
    except Exception as error:  # a configuration is a program, so that it can fail in any way
        raise InputError(f"config {path}: {describe(error)}") from error


def check_key(cfg: Mapping[str, Any], key: str) -> None:
    """Refuse a key of `--cfg-options` that nothing would read.

    Arguments of a class (beside a `type`) need not be there before: the class knows its own. A new dictionary among
    them, and a new key of other dictionaries, must not look like one that is there, misspelt.
    """
    *above, last = key.split(".")
    node: Any = cfg
    for depth, part in enumerate(above):
        if isinstance(node, list | tuple) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        elif depth == 0 and part in _runner_keys():
            return
        else:
            known = list(node) if isinstance(node, Mapping) else []
            if "type" in known and not difflib.get_close_matches(part, known, n=1, cutoff=ALIKE):
                return
            raise InputError(
                f"--cfg-options {key}: the config has no {'.'.join(above[: depth + 1])}; {nearest(part, known)}"
            )
    if isinstance(node, list | tuple):
        if not last.isdigit() or int(last) >= len(node):
            raise InputError(f"--cfg-options {key}: {'.'.join(above)} is a list of {len(node)}: give an index from 0")
        return
    if not isinstance(node, Mapping):
        raise InputError(f"--cfg-options {key}: {'.'.join(above)} is {node!r}, which has no keys")
    if last in node or "type" in node:
        return
    known = [str(name) for name in node] + ([] if above else _runner_keys())
    if not above and last not in known:
        raise InputError(f"--cfg-options {key}: unknown key; {nearest(last, known)}")
    if above and (close := difflib.get_close_matches(last, known, n=1, cutoff=ALIKE)):
        raise InputError(f"--cfg-options {key}: unknown key; did you mean {'.'.join([*above, close[0]])}?")


def _runner_keys() -> list[str]:
    arguments = list(inspect.signature(Runner.__init__).parameters)[1:]
    return [name for name in arguments if name != "cfg"] + list(OTHER_KEYS)


@contextlib.contextmanager
def building(path: str) -> Iterator[None]:
    """Report as one line what goes wrong while MMEngine builds an object that the configuration describes.

    Raises:
        InputError: an unknown type or argument, a value that the class refuses, ...; or of a process that loads data.
    """
    try:
        yield
    except InputError as error:
        message, _, said = str(error).rstrip().rpartition(f"{InputError.__name__}: ")
        if not message.startswith("Caught "):  # PyTorch's word for a traceback of another process
            raise
        raise InputError(said) from error
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        builds = [frame for frame in frames if frame.f_code is build_functions.build_from_cfg.__code__]
        if not builds:
            raise
        settings = builds[-1].f_locals["cfg"]
        built = settings.get("type")
        what = describe(error)
        if isinstance(error, AssertionError) and not str(error):
            what = _assertion(error, settings)
        raise InputError(f"config {path}: {getattr(built, '__name__', built)}: {what}") from error


def _assertion(error: AssertionError, settings: Mapping[str, Any]) -> str:
    """What a bare assertion asks for, with the arguments in it."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or "an assertion"
    words = set(re.findall(r"\w+", line))
    given = [f"{key}={value!r}" for key, value in settings.items() if key in words]
    return f"{', '.join(given) or 'its arguments'}: it needs `{line.removeprefix('assert ')}`"
