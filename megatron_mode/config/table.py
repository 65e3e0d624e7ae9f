"""Write the table of all configuration keys.

`python -m megatron_mode.config.table configs/README.md` renews the table in that file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_mode.config.describe import describe_fields

TABLE_BEGIN, TABLE_END = "<!-- keys: begin -->", "<!-- keys: end -->"


def write_table() -> str:
    """Write the table of all keys in Markdown."""
    lines = ["| key | accepted | default | meaning |", "|---|---|---|---|"]
    for field in describe_fields():
        meaning = field.meaning.replace("|", "\\|")
        lines.append(f"| `{field.key}` | {field.accepted} | `{field.default}` | {meaning} |")
    return "\n".join(lines)


def renew_table(text: str) -> str:
    """Replace what stands between the two table marks in a Markdown text."""
    before, _, rest = text.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_BEGIN}\n{write_table()}\n{TABLE_END}{after}"


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(renew_table(page.read_text("utf-8")), "utf-8")
