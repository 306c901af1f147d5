"""MkDocs' hook: README.md and what lies beside it are pages of the site, with their links as they are from there."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "BUILD.md": "building.md",
    "CHANGELOG.md": "changes.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    for name, page in PAGES.items():
        text = LINK.sub(_from_the_site, (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def _from_the_site(link: re.Match[str]) -> str:
    """A link of a page at the root as one of the site; a file that the site does not have is only named."""
    words, target, anchor = link[1], link[2], link[3] or ""
    inside = PAGES.get(target, target.removeprefix("docs/"))
    if inside == target and (ROOT / target).is_file():
        return words
    return f"[{words}]({inside}{anchor})"
