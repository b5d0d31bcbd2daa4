"""Formats a table of scores, a row for each model and set: for the screen, as Markdown, as CSV."""

import csv
import io
import math

from sr_jax.metrics.table import SCORES, Scores, Table, columns


def format_text(table: Table) -> str:
  """Formats a table for the screen."""
  rows = _rows(table)
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  names, scores = slice(0, 2), slice(2, None)
  return "\n".join(
    "  ".join(
      [cell.ljust(width) for cell, width in zip(row[names], widths[names], strict=True)]
      + [cell.rjust(width) for cell, width in zip(row[scores], widths[scores], strict=True)]
    )
    for row in rows
  )


def format_markdown(table: Table) -> str:
  """Formats a table as Markdown that GitHub shows as a table."""
  head, *body = [[cell.replace("|", "\\|") for cell in row] for row in _rows(table)]
  rule = ["---", "---", *["---:"] * (len(head) - 2)]
  return "".join("| " + " | ".join(row) + " |\n" for row in [head, rule, *body])


def format_csv(table: Table) -> str:
  """Formats a table for a spreadsheet, with all digits; what is missing is an empty cell."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["model", "set", *columns(table)])
  for model, sets in table.items():
    for set_name, scores in sets.items():
      writer.writerow([model, set_name, *(scores.get(key, "") for key in columns(table))])
  return text.getvalue()


def _rows(table: Table) -> list[list[str]]:
  rows = [["model", "set", *columns(table)]]
  for model, sets in table.items():
    for set_name, scores in sets.items():
      rows.append([model, set_name, *(_cell(scores, key) for key in columns(table))])
  return rows


def _cell(scores: Scores, key: str) -> str:
  if key not in scores:
    return "-"
  value = scores[key]
  return f"{value:.{SCORES[key].digits}f}" if math.isfinite(value) else str(value)
