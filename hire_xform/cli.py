"""The command line: ``hire-xform dump``, ``explain``, ``compare``, ``tune``, ``plan-mesh`` and ``demo``.

Flags of absl and of JAX work beside its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from absl.flags import argparse_flags

from hire_xform.api import Sparsified, sparsify
from hire_xform.call.signature import arguments_of
from hire_xform.call.stages import Traced
from hire_xform.comparing.comparison import Comparison
from hire_xform.comparing.run import checked_devices, comparison_of
from hire_xform.config import Config, Ffn, Rule, Vocab
from hire_xform.dump.dump import FORMATS, LOWERED, SHOWS, dump
from hire_xform.dump.targets import Target
from hire_xform.files import write_whole
from hire_xform.loading import LoadError, blame, demonstration, load_function, load_inputs
from hire_xform.mesh_plan import Device, ModelShapes, plan_mesh
from hire_xform.passes.plan.accelerators import SHEETS
from hire_xform.passes.plan.placement import platform_named
from hire_xform.tuning.keeping import VARIABLE, keep, key_of, profile_for, source_of
from hire_xform.tuning.measuring import measure
from hire_xform.tuning.report import key_text, table

_EVERYWHERE = Rule("*", force=True)


class CommandError(Exception):
    """Something the user can put right; the message is one line, and the exit code 2."""


class _Parser(argparse_flags.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code.

    Args:
      argv: the arguments after the program's name; None takes those of the process.
    """
    # JAX's own settings as flags, --jax_platforms and so on.
    if "jax_platforms" not in flags.FLAGS:
        jax.config.config_with_absl()
    line = ["hire-xform", *(sys.argv[1:] if argv is None else argv)]
    try:
        app.run(_run, argv=line, flags_parser=_parse)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="hire-xform", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command: Any
    for name, text in (("dump", _DUMP_HELP), ("explain", _EXPLAIN_HELP), ("compare", _COMPARE_HELP)):
        command = commands.add_parser(name, help=text, description=text, epilog=_TARGETS, allow_abbrev=False)
        command.add_argument("target", help="the function")
        command.add_argument(
            "--inputs", required=True, metavar="TARGET", help="its arguments: a tuple, or a function that returns one"
        )
        command.add_argument(
            "--weights-argnums", type=_numbers, metavar="N[,N...]", help="positions of the weights arguments (0)"
        )
        command.add_argument(
            "--weights-argnames", type=_names, metavar="NAME[,NAME...]", help="names of the weights arguments"
        )
        command.add_argument(
            "--force", action="store_true", help="rewrite sites that the cost model would leave dense, as at toy sizes"
        )
        if name == "dump":
            command.add_argument(
                "--show",
                choices=(*SHOWS, *LOWERED),
                default="diff",
                help="which program (diff: both, and what changed; stablehlo: as it is lowered; compiled: what the "
                "compiler made of it, dense against sparse)",
            )
            command.add_argument("--format", choices=FORMATS, default="text", help="text, JSON, or one HTML page")
            command.add_argument("--platform", type=_target, metavar="PLATFORM[:CHIP]", help=_PLATFORM_HELP)
        if name == "compare":
            command.add_argument(
                "--repeats", type=_positive, default=20, metavar="N", help="calls of each that are timed (20)"
            )
            command.add_argument("--sites", action="store_true", help="also measure what each site gives alone")
            command.add_argument("--format", choices=("text", "json"), default="text", help="text or JSON")
        command.add_argument("-o", "--output", metavar="FILE", help="write there instead of to standard output")
    command = commands.add_parser("plan-mesh", help=_MESH_HELP, description=_MESH_HELP, allow_abbrev=False)
    for flag, text in _MESH_COUNTS.items():
        command.add_argument(f"--{flag}", type=_positive, required=True, metavar="N", help=text)
    command.add_argument("--plain", action="store_true", help="one product into the hidden units instead of two")
    command.add_argument("--dtype", default="bfloat16", help="of weights and sums (bfloat16)")
    for flag, (default, text) in _MESH_NUMBERS.items():
        more = f" ({default:g})" if default is not None else ""
        command.add_argument(f"--{flag}", type=float, default=default, metavar="X", help=text + more)
    command.add_argument("--chip", choices=sorted(SHEETS), help="by its data sheet: bandwidth, link, memory, platform")
    command.add_argument("--platform", help="cpu, gpu or tpu (tpu, or the chip's)")
    command.add_argument("--devices", type=_numbers, required=True, metavar="N[,N...]", help="mesh sizes to compare")
    command.add_argument("--tokens", type=_positive, default=1, help="tokens a step (1)")
    command.add_argument("--candidates", type=_positive, help="logits computed exactly")
    command.add_argument("--active", type=float, help="share of the hidden units computed exactly")
    command = commands.add_parser(
        "tune", help=_TUNE_HELP, description=_TUNE_HELP, epilog=_TUNE_MORE, allow_abbrev=False
    )
    command.add_argument("--show", action="store_true", help="only show the profile that plans are made for")
    command.add_argument(
        "-o", "--output", metavar="FILE", help="write the profile there, and not to the user's cache folder"
    )
    command = commands.add_parser("demo", help=_DEMO_HELP, description=_DEMO_HELP, allow_abbrev=False)
    command.add_argument("--tokens", type=_positive, default=300, help="tokens to decode (300)")
    command.add_argument("--positions", type=_positive, default=1536, help="held-out positions to compare on (1536)")
    command.add_argument("--assets", metavar="FOLDER", help="where the model's weights are (examples/tiny_lm)")
    command.add_argument("--half", choices=("both", "first", "second"), default="both", help="which half to run (both)")
    return parser.parse_args(argv[1:])


_DESCRIPTION = "HiRE for JAX: decode with fewer weight bytes, by a compiler pass, without edits to the model."
_DUMP_HELP = "show the program of a function before and after, and what became of each site"
_EXPLAIN_HELP = "say what is rewritten in a function, what stays dense, and why"
_COMPARE_HELP = "run a function dense and sparse on its arguments: which is faster, and how far results are apart"
_TUNE_HELP = (
    "measure this machine in a few seconds and keep the profile, from which plans predict times, in the user's cache "
    "folder"
)
_TUNE_MORE = (
    "HIRE_TUNE says which profile plans are made for. Not set: the one that is kept, or else a cautious one that is "
    "built in. auto: measure where none is kept. off: one that is built in. A file, or the name of one that is built "
    "in: that one."
)
_DEMO_HELP = "decode with the bundled model, dense and sparse, then time a layer stack of a billion parameters"
_MESH_HELP = (
    "say what a decode step would read, send and take on a mesh of devices that are not here, and where it pays"
)
_MESH_COUNTS = {
    "inputs": "columns of the residual stream",
    "hidden": "hidden units of a block",
    "vocab": "entries of the vocabulary",
    "layers": "layers",
}
_MESH_NUMBERS = {
    "bandwidth": (None, "GB/s from a device's memory"),
    "link": (None, "GB/s from a device to the others"),
    "memory": (None, "GB of a device's memory"),
    "latency": (1.0, "microseconds of a collective"),
    "other": (0.0, "GB of all other weights, over all devices"),
}
_TARGETS = (
    "A TARGET is package.module:name or path/to/file.py:name; modules in the current folder can be imported. --inputs "
    "names the tuple of arguments, arrays or jax.ShapeDtypeStructs, a dictionary of them by name, or a function of no "
    "arguments that returns either; compare needs arrays."
)


_PLATFORM_HELP = (
    "what to plan, lower and compile for: cpu, cuda, cuda:h100, tpu, tpu:v5e, ...; a chip that is not here is "
    "described to its compiler, which has to be installed (the arguments' own)"
)


def _target(text: str) -> Target:
    try:
        return Target.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected positions such as 0 or 0,2")
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(name.isidentifier() for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}; expected names such as params or body,head")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    if not flags.FLAGS["verbosity"].present:
        # absl tells what JAX finds worth knowing of its backends, unless it is asked not to.
        logging.set_verbosity(logging.WARNING)
    try:
        if arguments.command == "demo":
            demonstration()(
                tokens=arguments.tokens,
                positions=arguments.positions,
                assets=Path(arguments.assets) if arguments.assets else None,
                half=arguments.half,
            )
            return 0
        if arguments.command == "plan-mesh":
            _write(_mesh(arguments), None)
            return 0
        if arguments.command == "tune":
            _write(_tune(arguments), None)
            return 0
        if arguments.command == "compare":
            compared = _compare(arguments)
            _write(f"{compared.to_json() if arguments.format == 'json' else compared}\n", arguments.output)
            return 0
        text = _dump(arguments) if arguments.command == "dump" else _trace(arguments).explain() + "\n"
        _write(text, arguments.output)
    except (CommandError, LoadError) as error:
        print(f"hire-xform {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _mesh(arguments: argparse.Namespace) -> str:
    """The table of ``plan_mesh``."""
    try:
        model = ModelShapes(
            inputs=arguments.inputs,
            hidden=arguments.hidden,
            vocab=arguments.vocab,
            layers=arguments.layers,
            gated=not arguments.plain,
            other_bytes=round(arguments.other * 1e9),
            dtype=arguments.dtype,
        )
        device = _device(arguments)
        settings = Vocab(candidates=arguments.candidates), Ffn(active=arguments.active)
        plan = plan_mesh(model, device, arguments.devices, tokens=arguments.tokens, vocab=settings[0], ffn=settings[1])
    except (ValueError, OverflowError) as error:
        raise CommandError(str(error)) from error
    return f"{plan}\n"


def _device(arguments: argparse.Namespace) -> Device:
    """That of a data sheet, with what else is said of it; or one of which all is said."""
    stated = {name: getattr(arguments, name) for name in ("bandwidth", "link", "memory")}
    missing = [f"--{name}" for name, value in stated.items() if value is None]
    given: dict[str, Any] = {name: value * 1e9 for name, value in stated.items() if value is not None}
    given["latency"] = arguments.latency * 1e-6
    if arguments.platform is not None:
        given["platform"] = arguments.platform
    if arguments.chip is not None:
        return Device.named(arguments.chip, **given)
    if missing:
        raise CommandError(f"no {', '.join(missing)}; expected them, or --chip, one of {', '.join(sorted(SHEETS))}")
    return Device(**given)


def _tune(arguments: argparse.Namespace) -> str:
    """Measures and keeps the profile of this machine, or only shows the one that is used; as a table."""
    platform = platform_named(jax.default_backend())
    output = None if arguments.output is None else Path(os.path.realpath(arguments.output))
    try:
        profile = profile_for(platform) if arguments.show else measure(platform)
        told = [table(profile)]
        if not arguments.show:
            told.append(f"measured on {key_text(key_of(platform))}")
        if output is None and arguments.show:
            told.append(f"{source_of(platform)}; HIRE_TUNE is {os.environ.get(VARIABLE) or 'not set'}")
        else:
            where = keep(profile, output)
            told.append("not kept" if where is None else f"kept in {where}")
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"can't write {arguments.output!r}: {error.strerror or error}") from error
    return "\n".join(told) + "\n"


def _dump(arguments: argparse.Namespace) -> str:
    """The program, or what became of it on a platform."""
    target, compiled = arguments.platform, arguments.show == "compiled"
    named = None if target is None else target.platform
    traced = _trace(arguments, target, compiled)
    try:
        return dump(traced, name=arguments.target, show=arguments.show, format=arguments.format, platform=named)
    except ValueError as error:
        raise CommandError(str(error).removeprefix("dump: ")) from error


def _trace(arguments: argparse.Namespace, target: Target | None = None, compiled: bool = False) -> Traced:
    """The function, traced for the inputs; for a platform, or for one of its devices, if one is named."""
    fun = load_function(arguments.target)
    args, kwargs = arguments_of(load_inputs(arguments.inputs))
    step = _sparsified(fun, arguments)
    if compiled and target is not None:
        try:
            args, kwargs = target.placed((args, kwargs))
        except ValueError as error:
            raise CommandError(str(error)) from error
    try:
        if target is not None:
            return step.traced_for(target.planned, args, kwargs, target.elsewhere)
        return step.trace(*args, **kwargs)
    except (Exception, SystemExit) as error:
        raise CommandError(f"tracing {arguments.target!r} raised {blame(error, fun)}") from error


def _compare(arguments: argparse.Namespace) -> Comparison:
    """The function, run dense and sparse on the inputs."""
    fun = load_function(arguments.target)
    args, kwargs = arguments_of(load_inputs(arguments.inputs))
    step = _sparsified(fun, arguments)
    try:
        checked_devices(step, args, kwargs)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error).removeprefix("compare: ")) from error
    try:
        return comparison_of(step, args, kwargs, arguments.repeats, arguments.sites)
    except (Exception, SystemExit) as error:
        raise CommandError(f"comparing {arguments.target!r} raised {blame(error, fun)}") from error


def _sparsified(fun: Any, arguments: argparse.Namespace) -> Sparsified:
    if isinstance(fun, Sparsified):
        if arguments.weights_argnums is not None or arguments.weights_argnames is not None:
            raise CommandError(
                f"{arguments.target!r} is sparsified already, with its own {fun.signature.stated}; leave the option out"
            )
        if not arguments.force:
            return fun
        # First, so that the function's own rules still win.
        config = dataclasses.replace(fun.config, rules=(_EVERYWHERE, *fun.config.rules))
        return Sparsified(fun.fun, config, fun.weights, fun.jit_options, fun.calibration)
    config = Config(rules=(_EVERYWHERE,) if arguments.force else ())
    weights = {"weights_argnums": arguments.weights_argnums, "weights_argnames": arguments.weights_argnames}
    try:
        return sparsify(fun, config=config, **weights)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def _write(text: str, output: str | None) -> None:
    """Writes to a file in one move, so that a failure leaves what was there; or to standard output."""
    if output is None or output == "-":
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has seen enough. What is left in the buffer goes nowhere, without a complaint at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    path = Path(os.path.realpath(output))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_text(text, encoding="utf-8")  # a device or a pipe
            return
        write_whole(path, text.encode())
    except OSError as error:
        raise CommandError(f"can't write {output!r}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
