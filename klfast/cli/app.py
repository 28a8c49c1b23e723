"""The commands: what they take, and how a request that cannot be met is answered."""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import klfast
from klfast.cli import demo as demo_data
from klfast.cli import rows
from klfast.cli.files import Array, check_output, check_same_shape, open_array, replacing
from klfast.cli.report import show_comparison, strict_json, unit

Check = Callable[[click.Context, click.Parameter, float | None], float | None]

FAILED, INTERRUPTED = 2, 130
ASCII_STAND_INS = {"‖": "||", "±": "+-", "…": "...", "░": ".", "▒": "+", "▓": "#", "█": "@"}


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Replace what a terminal's encoding lacks by something that reads alike."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(ASCII_STAND_INS.get(character, "?") for character in lost), error.end


codecs.register_error("klfast.stand_in", _stand_in)


class OneLineErrors(click.Group):
    """A group of commands that answers a bad request with one line on stderr and status 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="klfast.stand_in")
        try:
            super().main(*args, **extra | {"standalone_mode": False})
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "klfast"
            _fail(f"{error.format_message()} See '{command} --help'.")
        except click.ClickException as error:
            _fail(error.format_message())
        except (OSError, MemoryError) as error:
            _fail(str(error) or "out of memory")
        except click.Abort:
            sys.exit(INTERRUPTED)
        sys.exit(0)


def _fail(message: str) -> None:
    click.echo("klfast: " + " ".join(message.split()), err=True)
    sys.exit(FAILED)


def _above(bound: float) -> Check:
    def check(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
        if value is not None and not bound < value < math.inf:
            raise click.BadParameter(f"{value:g} is not a finite number above {bound:g}.")
        return value

    return check


base_option = click.option(
    "--base",
    type=float,
    callback=_above(1),
    help="Base of the logarithm: 2 gives bits.  [default: e, which gives nats]",
)
worst_option = click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="How many of the worst rows to show.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON. null stands for a number that is undefined or not finite.",
)


@click.group(
    name="klfast",
    cls=OneLineErrors,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(klfast.__version__, prog_name="klfast", message="%(prog)s %(version)s")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Kullback-Leibler divergence, fast and right to the last digits.

    Try 'klfast demo' first.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@app.command()
@click.argument("p")
@click.argument("q")
@click.option("--logits", is_flag=True, help="The files hold logits, not probabilities.")
@click.option(
    "--temperature",
    type=float,
    callback=_above(0),
    help="Divide the logits by this.  [default: 1]",
)
@click.option("--axis", default=-1, show_default=True, help="The axis of the classes.")
@base_option
@worst_option
@json_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the divergence of each row to this .npy file (float64).",
)
def compare(
    p: str,
    q: str,
    *,
    logits: bool,
    temperature: float | None,
    axis: int,
    base: float | None,
    worst: int,
    as_json: bool,
    output: Path | None,
) -> None:
    """Compare the distributions in two files row by row: KL(P‖Q).

    P and Q are arrays of one shape, (..., classes): probabilities or other non-negative weights,
    each row of which is normalised, or logits. A .npy file of any size will do, as it is not read
    into memory; of an .npz file with several arrays, pick one: FILE.npz:name.

    Rows whose KL is infinite or NaN are counted apart from the mean, quantiles and maximum; only
    those with NaN are left out of the top-1 agreement.
    """
    if temperature is not None and not logits:
        raise click.UsageError("--temperature needs --logits.")
    p_array, q_array = open_array(p, axis), open_array(q, axis)
    check_same_shape(p_array, q_array)
    if output is not None:
        check_output(output, [p, q])

    divergence: Callable[[Array, Array], Array] = partial(klfast.kl_discrete, base=base)
    if logits:
        divergence = partial(klfast.kl_categorical, temperature=temperature or 1.0, base=base)
    with replacing(output) if output is not None else nullcontext() as file:
        with _progress(p_array) as advance:
            results = rows.compare_rows(p_array, q_array, divergence, advance)
        if file is not None:
            np.save(file, results.kl)
    summary = rows.summarise(p_array, q_array, results, worst)

    kind = "logits" if logits else "probabilities"
    p_name, q_name = click.format_filename(p), click.format_filename(q)
    output_name = None if output is None else click.format_filename(output)
    if as_json:
        request = {
            "p": p_name,
            "q": q_name,
            "input": kind,
            "axis": axis,
            "temperature": (temperature or 1.0) if logits else None,
            "output": output_name,
        }
        click.echo(strict_json(_heading(base) | request | asdict(summary)))
        return
    scaling = "" if temperature is None else f" divided by {temperature:g}"
    heading = f"P: {p_name}\nQ: {q_name}\n{kind}{scaling}, classes on axis {axis}"
    show_comparison(summary, heading, unit(base), logits=logits)
    if output_name is not None:
        click.echo(f"Wrote {summary.rows} values to {output_name}")


def _heading(base: float | None) -> dict[str, Any]:
    return {
        "klfast": klfast.__version__,
        "direction": "KL(P||Q)",
        "unit": unit(base),
        "base": base,
    }


@contextmanager
def _progress(array: Array) -> Iterator[Callable[[int], object]]:
    """Show how many rows are done: on a terminal, and when there is more than one slice of them."""
    if array.size <= rows.SLICE_VALUES or not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=array.size // array.shape[-1])
        yield lambda done: bar.advance(task, done)


@app.command()
@base_option
@worst_option
@json_option
def demo(*, base: float | None, worst: int, as_json: bool) -> None:
    """See what rounding the weights of a classifier costs, and where.

    The classifier reads handwritten digits. Its scores (logits) for images it has not seen ship
    with klfast: at full precision, P, and with weights rounded to 8 and to 4 bits, Q.
    """
    data = demo_data.load()
    facts = demo_data.evaluate(data, partial(klfast.kl_categorical, base=base), worst)
    if as_json:
        click.echo(strict_json(_heading(base) | facts.as_dict()))
    else:
        demo_data.show(facts, data, unit(base))


@app.command()
def config() -> None:
    """Show the version, the instruction set and the threads in use."""
    klfast.show_config()
