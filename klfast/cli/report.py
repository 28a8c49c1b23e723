"""What the commands print: tables for people, strict JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from klfast.cli.rows import Flagged, Summary

DIRECTION = "KL(P‖Q)"
UNITS = {None: "nats", 2.0: "bits", 10.0: "hartleys"}


def unit(base: float | None) -> str:
    """Name the unit of a divergence taken with logarithms to `base`."""
    return UNITS.get(base, f"units of ln {base} nats")


def console() -> Console:
    """Give a console that prints text as it is: file names hold no markup."""
    return Console(markup=False, highlight=False)


def strict_json(facts: Any) -> str:
    """Write `facts` as JSON, with null for numbers that are not finite, which JSON cannot hold."""
    return json.dumps(_without_nan(facts), indent=2, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def mean_with_error(mean: float, error: float) -> str:
    return number(mean) if math.isnan(error) else f"{mean:.4g} ± {error:.2g}"


def percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f} %"


def row_name(index: Sequence[int]) -> str:
    """Name a row by its place in the batch; the one row of a vector is row 0."""
    return ", ".join(map(str, index)) or "0"


def table(title: str, *columns: str) -> Table:
    """Give an empty table whose first column is text and whose others are numbers."""
    result = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    result.show_header = any(columns)
    for column in columns:
        result.add_column(column, justify="right" if result.columns else "left")
    return result


def statistics_table(title: str, summaries: Mapping[str, Summary], unit_name: str) -> Table:
    """Give a table with a column of facts for each summary.

    Parameters
    ----------
    title : str
        Of the table; an empty one is not shown.
    summaries : mapping of str to Summary
        By the heading of their columns; an empty heading is not shown.
    unit_name : str
        The unit of the divergences.

    Returns
    -------
    Table
    """
    shown = list(summaries.values())
    result = table(title, "", *summaries)

    def add(fact: str, *cells: str) -> None:
        result.add_row(fact, *cells)

    add("rows", *(f"{s.rows}" for s in shown))
    add("classes", *(f"{s.classes}" for s in shown))
    add(
        f"mean {DIRECTION}, {unit_name}",
        *(mean_with_error(s.mean, s.standard_error) for s in shown),
    )
    add("median", *(number(s.median) for s in shown))
    for level in shown[0].quantiles:
        add(f"{100 * float(level):g} % quantile", *(number(s.quantiles[level]) for s in shown))
    add("maximum", *(number(s.maximum) for s in shown))
    add("same top-1 class", *(percent(s.top1_agreement) for s in shown))
    add("other top-1 class, rows", *(f"{s.top1_changed}" for s in shown))
    return result


def apart(flagged: Flagged, what: str, why: str) -> str:
    """Say how many rows were left out of the statistics, where the first are, and why."""
    rows = "row" if flagged.count == 1 else "rows"
    places = "; ".join(map(row_name, flagged.first))
    more = "; …" if flagged.count > len(flagged.first) else ""
    return f"{flagged.count} {rows} with {what}, left out above: {why}. At {places}{more}"


def worst_table(summary: Summary, unit_name: str) -> Table:
    """Give a table of the worst rows."""
    result = table("Worst rows", "row", f"{DIRECTION}, {unit_name}", "top-1 of P", "top-1 of Q")
    for row in summary.worst:
        result.add_row(row_name(row.index), number(row.kl), str(row.top1_p), str(row.top1_q))
    return result


def show_comparison(summary: Summary, heading: str, unit_name: str, *, logits: bool) -> None:
    """Print the facts about a comparison under a heading that says what was compared."""
    out = console()
    out.print(heading, soft_wrap=True)
    out.print(statistics_table("", {"": summary}, unit_name))
    if summary.infinite_rows.count:
        why = "Q excludes a class that P allows"
        out.print(apart(summary.infinite_rows, "infinite KL", why), soft_wrap=True)
    if summary.nan_rows.count:
        why = "NaN or +inf among the logits, or no class allowed"
        if not logits:
            why = "negative, infinite or NaN values, or only zeros (logits need --logits)"
        out.print(apart(summary.nan_rows, "NaN for KL", why), soft_wrap=True)
    if summary.worst:
        out.print(worst_table(summary, unit_name))
