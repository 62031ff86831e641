"""The command line: ``lightning-polydis``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from lightning_polydis._checks import InputError
from lightning_polydis._text import counted
from lightning_polydis._version import __version__
from lightning_polydis.checkpoint_files import read_checkpoint
from lightning_polydis.plan import SplitPlan
from lightning_polydis.report import PolysemanticityReport
from lightning_polydis.split_state import split_layers, with_splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_polydis.splitting import SplitLayer

PROGRAM = "lightning-polydis"
DONE, FAILED = 0, 1  # argparse ends with 2 where it was called wrongly

DESCRIPTION = """\
Look at reports of polysemantic channels, and split the channels of networks that are saved in checkpoints.

The reports come from a training run with the callback ChannelDisentanglement (report.json and split_plan.json
in its log directory), or from find_polysemantic_channels and report.save(...)."""

EPILOG = """\
examples:
  lightning-polydis show report.json
  lightning-polydis report report.json -o report.html
  lightning-polydis apply-plan best.ckpt split_plan.json split.ckpt

exit codes: 0 done; 1 a file is missing, damaged, of another kind or does not fit; 2 wrong usage"""

APPLY = """\
Write a checkpoint in which the channels of a plan are split, without the network's code.

The output loads with lightning_polydis.load_from_checkpoint(ModuleClass, OUT), and, for a plain state dict,
after lightning_polydis.surgery.rebuild_splits(model, state_dict). Optimizer states and averages of weights are
left out: they belong to the layers before the split, so train on with a new optimizer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Of the command line; `None`: those of the process.

    Returns:
        The exit code: 0 done, 1 something that the user can mend, in one line on standard error. Wrong usage ends the
        process with 2, as argparse does it.

    Example:
        >>> main(["show", "missing.json"])
        1
    """
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (InputError, OSError, ModuleNotFoundError) as error:
        print(f"{PROGRAM}: error: {_in_one_line(error)}", file=sys.stderr)
        return FAILED
    return DONE


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: `{error.filename}`" if error.filename else error.strerror
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_report(commands)
    _add_show(commands)
    _add_apply_plan(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "make one self-contained HTML page of a report"
    command = commands.add_parser("report", help=text, description=f"{text.capitalize()}; it opens offline.")
    command.add_argument("input", metavar="IN", type=Path, help="report.json")
    command.add_argument("-o", "--output", metavar="OUT", type=Path, help="the page (default: beside IN, as .html)")
    command.add_argument("--force", action="store_true", help="replace OUT even if it is no .html or .htm file")
    command.set_defaults(run=_report)


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "print the polysemantic channels of a report as a table"
    command = commands.add_parser("show", help=text, description=f"{text.capitalize()}.")
    command.add_argument("input", metavar="IN", type=Path, help="report.json")
    command.add_argument("--max-rows", metavar="N", type=_positive, default=20, help="rows at most (default: 20)")
    command.set_defaults(run=_show)


def _add_apply_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "apply-plan", help="split the channels of a plan in a checkpoint", description=APPLY, formatter_class=raw
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Lightning's .ckpt, or a state dict")
    command.add_argument("plan", metavar="PLAN", type=Path, help="split_plan.json")
    command.add_argument("output", metavar="OUT", type=Path, help="the checkpoint to write; .safetensors for tensors")
    command.add_argument("--prefix", default="", help='put before the plan\'s layer names, for instance "net."')
    command.add_argument(
        "--groups",
        metavar="LAYER=N",
        type=_groups,
        action="append",
        default=[],
        help="groups of a convolution (1: an ordinary one), where the checkpoint does not tell; may be repeated",
    )
    command.add_argument("--force", action="store_true", help="overwrite OUT if it exists, but never the input")
    command.add_argument(
        "--trust",
        action="store_true",
        help="read checkpoints that hold more than tensors and plain types; this can run code that is hidden in them",
    )
    command.set_defaults(run=_apply_plan)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, but got {text!r}")
    return int(text)


def _groups(text: str) -> tuple[str, int]:
    layer, equals, number = text.rpartition("=")
    if not equals or not layer:
        raise argparse.ArgumentTypeError(f"expected LAYER=N, but got {text!r}")
    return layer, _positive(number)


def _report(given: argparse.Namespace) -> None:
    output: Path = given.output or given.input.with_suffix(".html")
    if _is_same(output, given.input):
        raise InputError(f"Expected the page to have a name of its own, but got `{output}`, which is the report.")
    if output.exists() and output.suffix.lower() not in (".html", ".htm") and not given.force:
        raise InputError(f"`{output}` exists already and is no page. Choose another name, or add `--force`.")
    PolysemanticityReport.load(given.input).to_html(output)
    print(f"Wrote {output} ({output.stat().st_size / 2**20:.1f} MB).")


def _show(given: argparse.Namespace) -> None:
    report = PolysemanticityReport.load(given.input)
    console = Console()
    console.print(report.to_table(given.max_rows))
    if not report.channels:
        console.print(escape(_suggested(report)))


def _suggested(report: PolysemanticityReport) -> str:
    if report.has_clusters:  # no other settings were tried
        return "More images may show clusters that so few do not."
    try:
        suggested = report.suggest_settings()
    except InputError:  # the file holds no sweep
        return "Run the analysis again to see what other settings would have found."
    return f"Suggested settings: {suggested}"


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file, links included."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def _apply_plan(given: argparse.Namespace) -> None:
    for name, path in (("CHECKPOINT", given.checkpoint), ("PLAN", given.plan)):
        if _is_same(given.output, path):
            raise InputError(f"Expected OUT to be a file of its own, but got `{given.output}`, which is {name}.")
    if given.output.exists() and not given.force:
        raise InputError(f"`{given.output}` exists already. Choose another name, or add `--force` to overwrite it.")
    plan = _prefixed(SplitPlan.load(given.plan), given.prefix)
    if not len(plan):
        raise InputError(f"`{given.plan}` splits no channel: there is nothing to do.")
    checkpoint = read_checkpoint(given.checkpoint, trusted=given.trust).without_states()
    layers = split_layers(checkpoint.state_dict, plan, dict(given.groups), is_ordered=checkpoint.is_ordered)
    checkpoint.save(given.output, with_splits(checkpoint.state_dict, layers))
    for name, layer in layers.items():
        print(_told(name, layer))
    if checkpoint.left_out:
        print(f"Left out, as they belong to the layers before the split: {', '.join(checkpoint.left_out)}.")
    print(f"Wrote {given.output}.")


def _prefixed(plan: SplitPlan, prefix: str) -> SplitPlan:
    return SplitPlan([replace(split, layer=prefix + split.layer) for split in plan])


def _told(name: str, layer: SplitLayer) -> str:
    n_split, kind = len(layer.channels), type(layer.expand).__name__
    groups = f" of {layer.n_groups} groups" if layer.n_groups > 1 else ""
    return (
        f"{name}: {n_split} of {counted(layer.n_channels, 'channel')} split; {kind}{groups}, now with "
        f"{layer.expand.weight.shape[0]} rows."
    )


if __name__ == "__main__":
    sys.exit(main())
