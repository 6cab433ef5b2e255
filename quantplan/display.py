"""How values look in notebooks, and how tables become data frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from quantplan.errors import MissingPackageError


@dataclass(frozen=True)
class Table:
    """A table that notebooks show and that converts to a data frame.

    Attributes:
        caption: What it is about.
        columns: Values by name of the column, all of one length; numbers are in the unit that the
            name ends in.
    """

    caption: str
    columns: Mapping[str, Sequence[Any]]

    def to_frame(self) -> Any:
        """A pandas data frame, or a polars one where only polars is installed.

        Raises:
            MissingPackageError: Neither is installed.
        """
        columns = {name: list(values) for name, values in self.columns.items()}
        try:
            import pandas  # noqa: PLC0415 (optional)
        except ImportError:
            pass
        else:
            return pandas.DataFrame(columns)
        try:
            import polars  # noqa: PLC0415 (optional)
        except ImportError as error:
            raise MissingPackageError("to_frame", "pandas or polars", "frames") from error
        return polars.DataFrame(columns)

    def _repr_html_(self) -> str:
        rows = zip(*self.columns.values(), strict=True)
        return html_table(self.caption, list(self.columns), rows)


def html_table(caption: str, header: Sequence[str], rows: Any) -> str:
    """A table as HTML; numbers are aligned right, floats have four digits.

    Args:
        caption: What it is about.
        header: Names of the columns.
        rows: Their cells: texts, numbers or None.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def html_card(title: str, facts: Mapping[str, str], *tables: str, notes: Sequence[str] = ()) -> str:
    """A value as HTML: a title, facts by name, tables, remarks.

    Args:
        title: What it is.
        facts: Texts by what they are about.
        tables: HTML of tables, from `html_table`.
        notes: Remarks.
    """
    pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return "".join(
        [
            f"<div><strong>{escape(title)}</strong>",
            f"<dl>{pairs}</dl>" if pairs else "",
            *tables,
            f"<ul>{said}</ul>" if said else "",
            "</div>",
        ]
    )


def _cell(value: object) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        return f'<td style="text-align: right">{text}</td>'
    return f"<td>{escape(str(value))}</td>"
