"""Makes a checkout ready to be built for an index: python scripts/release.py https://github.com/OWNER/NAME v0.2.0

Exits 1 where the tag, mann_fast.__version__ and the first heading of CHANGELOG.md are not of one version. Else it writes the
repository's address into the checkout, which names it nowhere so that a fork need not change it: as ``urls`` into
pyproject.toml, and into README.md, which an index shows alone, away from the files that its links lead to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check_version(root: Path, tag: str) -> None:
    """Raises SystemExit if the tag is not that of the version that the files under root say."""
    source = (root / "mann_fast" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, but mann_fast.__version__ is {version}")
    heading = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    if heading.partition(",")[0] != version:
        raise SystemExit(f'CHANGELOG.md begins with "{heading}", but the version is {version}')


def with_address(readme: str, address: str, tag: str) -> str:
    """README.md with links that lead to the repository's files at the tag from anywhere."""
    readme = readme.replace("URL-of-this-repository", f"{address}.git")
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{address}/raw/{tag}/", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{address}/blob/{tag}/", readme)


def main(address: str, tag: str, root: Path = ROOT) -> None:
    check_version(root, tag)
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(with_address(readme.read_text(encoding="utf-8"), address, tag), encoding="utf-8")
    before, table, after = project.read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")
    changes = f"{address}/blob/{tag}/CHANGELOG.md"
    urls = f'[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\nChangelog = "{changes}"\n'
    project.write_text(f"{before}{urls}\n{table}{after}", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
