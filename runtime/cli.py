"""Command line options as fields of a dataclass: how a value is read, checked, shown in the help and typed again."""

import argparse
import contextlib
import os
import re
import shlex
import sys
from dataclasses import field, fields
from pathlib import Path

from runtime.errors import leave, report

METAVARS = {"bool": "BOOL", "int": "N", "float": "X", "Path": "PATH", "str": "NAME"}  # in the help, by type
LARGEST = 2**31 - 1  # of all whole numbers, so that arithmetic on them does not overflow


def matching(pattern: str, expected: str, text: str) -> str:
    """A word that matches a pattern."""
    if not re.fullmatch(pattern, text):
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return text


def boolean(text: str) -> bool:
    """True/False, yes/no, 1/0 in any case (argparse's own `type=bool` reads "False" as True)."""
    return matching("(?i)true|yes|1|false|no|0", "True or False", text).lower() in ("true", "yes", "1")


def number(kind: type, least: float, most: float, text: str):
    """A number of a kind, int or float, from `least` to `most`."""
    with contextlib.suppress(ValueError):
        if least <= kind(text) <= most:  # False for NaN
            return kind(text)
    name = "whole number" if kind is int else "number"
    raise argparse.ArgumentTypeError(f"expected a {name} from {least} to {most}, not {text!r}")


def folder_name(text: str) -> Path:
    """The path of a folder, ~ expanded; an empty word, perhaps of an unset variable, is an error."""
    return Path(os.path.expanduser(matching("(?s).+", "the name of a folder", text)))


def file_name(text: str, suffix: str = "") -> Path:
    """The path of a file, ~ expanded; a folder, or another suffix if one is given, is an error."""
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path) or not path.name.endswith(suffix):  # no name at all is the current folder
        raise argparse.ArgumentTypeError(f"expected the name of a {suffix} file, not {text!r}")
    return path


def format_number(value: float) -> str:
    """A number as one would type it, exactly: 5.0 is 5, and no two numbers look alike."""
    return repr(value).removesuffix(".0")


def typed(value) -> str:
    """An option's value as one would type it in a shell."""
    if isinstance(value, tuple):
        return " ".join(map(typed, value))
    if isinstance(value, float):
        return format_number(value)
    if os.name != "nt":
        return shlex.quote(str(value))
    return str(value) if re.fullmatch(r"[\w.:/+-]+", str(value)) else f'"{value}"'  # as cmd and PowerShell read it


def option(group: str, text: str, parse=str, default=None, choices=None):
    """A dataclass field that is a command line option, shown in a group of the help with what it means."""
    text += "" if default in (None, False) else f" (default: {default})"
    return field(default=default, metadata={"group": group, "help": text, "parse": parse, "choices": choices})


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser(script: str, options_class: type) -> Parser:
    """The parser of a script, from the docstring and fields of its options; what is not given is not in its result."""
    usage, description = f"{script} [options]", options_class.__doc__
    parser = Parser(script, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    titles = dict.fromkeys(f.metadata["group"] for f in fields(options_class))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for f in fields(options_class):
        field_type, metadata = str(f.type), f.metadata
        keywords = {"type": metadata["parse"], "choices": metadata["choices"], "help": metadata["help"]}
        keywords["metavar"] = next(METAVARS[name] for name in METAVARS if name in field_type)
        if "tuple" in field_type:
            keywords |= {"nargs": "+", "action": "extend"}  # --temp 5 --temp 20 is --temp 5 20
        elif "bool" in field_type:  # --kd alone is --kd True
            keywords |= {"nargs": "?", "const": True}
        groups[metadata["group"]].add_argument(f"--{f.name}", **keywords)
    return parser


def parse_words(script: str, options_class, argv: list | None, needs: dict, excludes: dict) -> tuple[Parser, dict]:
    """The parser, for further errors, and what `argv` gives by name; exits with code 2 if that breaks a rule."""
    parser = build_parser(script, options_class)
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    # --num-epochs is --num_epochs
    words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
    given = vars(parser.parse_args(words))
    chosen = [name for name, value in given.items() if value is not False]
    for name in chosen:
        for other in excludes.get(name, "").split():
            if other in chosen:
                parser.error(f"--{name} and --{other} can't be combined: leave one of them out")
    for name in given:
        needed = needs.get(name, "").split()
        if needed and not any(other in chosen for other in needed):
            wanted = " or ".join(f"--{other} True" for other in needed)
            parser.error(f"--{name} requires {wanted}: add that, or leave --{name} out")
    return parser, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def answer_early(parse) -> None:
    """Exit at once for --help or a wrong option; else check the versions of the packages, whose import is slow."""
    parse()
    with contextlib.suppress(AttributeError):  # a notebook's stream can't do this
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal prints ?, not a traceback
    if "IPython" not in sys.modules:
        os.environ.pop("MPLBACKEND", None)  # a notebook's own, for its shell, which may not be installed here
    try:
        import matplotlib
        import PIL
        import torch

        for package, least in ((torch, (2, 11)), (matplotlib, (3, 7)), (PIL, (10, 2))):
            found = package.__version__
            if tuple(int(number) for number in found.split(".")[:2]) < least:
                raise ImportError(f"{package.__name__} {found} is too old")
        import torchvision  # noqa: F401
        import tqdm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is of another torch
        sys.exit(report(f"can't start: {error}; install the packages with `pip install -U -r requirements.txt pillow`"))
    except OSError as error:  # the packages need a cache or temporary folder that they can write to
        advice = "set TMPDIR to a folder that can be written to, or install the packages again"
        if os.name == "nt":
            advice = "install Microsoft's Visual C++ Redistributable, or the packages again"
        sys.exit(report(f"can't start: {error}; {advice}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        leave(130)
