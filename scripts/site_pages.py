"""What mkdocs.yml needs beside docs/: pages that lie elsewhere, pages of the API, and links in docstrings.

- README.md, CHANGELOG.md and others lie where GitHub looks for them. On the site they are files beside those of docs/, and
  links among all of them lead to the site's.
- Each page ``api/MODULE.md`` of the menu is made of the docstrings of that module's public names. They are read from the
  sources: nothing is imported, so the site needs neither torch nor a compiler.
- Docstrings refer to others as ``:func:`name```; on the site that is a link.
"""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CITATION.cff": "CITATION.cff",
    "LICENSE": "LICENSE.txt",
}


def on_files(files, config):
    for source, page in ELSEWHERE.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text(encoding="utf-8"))
        text = text.replace("URL-of-this-repository", config["repo_url"] or "URL-of-this-repository")
        files.append(File.generated(config, page, content=_linked(text)))
    for page in re.findall(r"'(api/[\w.]+\.md)'", str(config["nav"])):
        module = page.removeprefix("api/").removesuffix(".md")
        files.append(File.generated(config, page, content=f"# {module}\n\n::: {module}\n"))
    return files


def on_page_markdown(markdown, page, config, files):
    return _linked(markdown)


def _linked(markdown: str) -> str:
    for source, page in ELSEWHERE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}(?=[)#])", f"]({page}", markdown)
    return markdown


class Roles(griffe.Extension):
    """Docstrings' :func:`name` and the like become links where the name has a page."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r":(?:func|class|meth|mod):`([\w.]+)`",
                lambda match: _reference(obj, match[1]),
                obj.docstring.value,
            )


def _reference(obj: griffe.Object, name: str) -> str:
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
