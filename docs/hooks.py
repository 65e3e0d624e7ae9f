"""Let MkDocs follow links out of docs/: README is the first page, a linked file gets its own.

README.md             -> index.md
configs/README.md     -> repository/configs/README.md, as it is
megatron_mode/x.py    -> repository/megatron_mode/x.py.md, as a block of code
a picture             -> repository/..., copied
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|#)([^)#\s]+)")
PICTURES = (".png", ".svg")


def page_of(name: str) -> str:
    """Return where the site keeps a file of the repository, relative to docs/."""
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    is_kept = name.endswith((".md", *PICTURES))
    return f"repository/{name}" if is_kept else f"repository/{name}.md"


def targets(name: str, text: str) -> list[str]:
    """List the files of the repository that a page links to; `name` is the page's own."""
    folder = posixpath.dirname(name)
    return [posixpath.normpath(posixpath.join(folder, link)) for _, link in LINK.findall(text)]


def relink(name: str, text: str) -> str:
    """Point the links of a page to where the site keeps their files."""
    own_folder, site_folder = posixpath.dirname(name), posixpath.dirname(page_of(name))

    def point(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(own_folder, match[2]))
        return match[1] + posixpath.relpath(page_of(target), site_folder or ".")

    return LINK.sub(point, text)


def site_pages() -> dict[str, str | bytes]:
    """Return every page and picture of the site with its content, by its place below docs/."""
    pages: dict[str, str | bytes] = {}
    waiting = ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    while waiting:
        name = waiting.pop()
        file = ROOT / name
        if page_of(name) in pages or not file.is_file():
            continue  # a link to nothing stays as it is, and strict mode reports it
        if name.endswith(PICTURES):
            pages[page_of(name)] = file.read_bytes()
        elif name.endswith(".md"):
            text = file.read_text("utf-8")
            pages[page_of(name)] = relink(name, text)
            waiting += targets(name, text)
        else:
            # No language: a fence longer than any in the file keeps it in one block.
            pages[page_of(name)] = f"# {name}\n\n``````text\n{file.read_text('utf-8')}\n``````\n"
    return pages


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of docs/ by the pages with their links pointed inside the site."""
    for place, content in site_pages().items():
        if known := files.get_file_from_path(place):
            files.remove(known)
        files.append(File.generated(config, place, content=content))
    return files
