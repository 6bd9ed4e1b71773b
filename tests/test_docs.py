"""The pages of docs/: their examples run, and what they refer to exists."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
]
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the tests run without the source tree's docs")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(page):
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_examples(page, count):
    """Each alone, as a reader would take it. What all have named."""
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == count
    found = {}
    for example in examples:
        namespace = {}
        exec(compile(example, str(page), "exec"), namespace)
        found |= namespace
    return found


def test_examples_of_layers_run():
    assert run_examples(DOCS / "layers.md", 10)["logits"].shape == (50, 16, 5)


def test_examples_of_few_shot_run():
    found = run_examples(DOCS / "few-shot.md", 5)
    assert found["probabilities"].shape == (1, 3) and found["logits"].shape == (20, 4, 5)
    assert found["same"].orders == 32
    assert found["found"].examples.shape == (1, 5) and found["found"].slots.shape == (1, 32, 400)


def test_examples_of_compiling_run():
    assert run_examples(DOCS / "compiling.md", 3)["logits"].shape == (7, 2, 5)


def test_example_of_migrating_runs():
    run_examples(DOCS / "migrating.md", 2)


@pytest.mark.filterwarnings("ignore")  # of these libraries about themselves
def test_examples_of_rl_run():
    for package in ("torchrl", "sb3_contrib", "popgym.baselines.ray_models.base_model"):
        pytest.importorskip(package, exc_type=ImportError)
    assert run_examples(DOCS / "rl.md", 3)["data"]["features"].shape == (20, 64)


def test_examples_of_sequences_run():
    assert run_examples(DOCS / "sequences.md", 7)["logits"].shape == (20, 4, 3)


def test_examples_of_sparse_run():
    pytest.importorskip("faiss", exc_type=ImportError)
    found = run_examples(DOCS / "sparse.md", 4)
    assert found["slots"].shape == (2, 1, 4) and found["state"].memory.clock == 600


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@every_page
def test_lists_and_tables_begin_where_the_site_sees_them(page):
    """GitHub lets them begin below a line of text; Python-Markdown, which makes the site, wants an empty line or a heading."""
    blocks = re.split(r"\n\s*\n", without_code(page))
    texts = [re.sub(r"^(#.*\n)+", "", block.lstrip("\n")) for block in blocks]
    paragraphs = [text for text in texts if not re.match(r"[-*] |\d+\. |\||\s", text)]
    hidden = [text for text in paragraphs if re.search(r"^([-*] |1\. |\|)", text, re.MULTILINE)]
    assert not hidden


def test_every_page_is_in_the_menu_of_the_site():
    named = re.findall(
        r"^ +- (?:\w+: )?([\w.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(named) == len(set(named))
    assert {path.name for path in DOCS.glob("*.md")} <= set(named)


@every_page
def test_links_lead_where_github_and_the_site_have_them(page):
    """Pages beside this one, and Markdown files of the root: of anything else the site would have a broken link."""
    places = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", without_code(page))
    root = page.parent == ROOT
    for place in places:
        target = (page.parent / place).resolve()
        beside = target.parent == DOCS or (target.parent == ROOT and target.suffix == ".md")
        assert target.exists() and (beside or root), place


@pytest.mark.once
def test_the_site_builds_and_no_link_of_it_is_broken(tmp_path):
    for package in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    assert "lrua_scan" in (tmp_path / "api" / "mann_fast.ops" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["speed.png", "accuracy.png"])
def test_pictures_show_the_figures_of_the_tables(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from pictures import PICTURES

    figures = PICTURES[name][0]
    with Image.open(DOCS / name) as image:
        drawn = json.loads(image.text["Description"])
    assert drawn == figures(), "python benchmarks/pictures.py draws them anew"


@every_page
def test_files_that_are_named_exist(page):
    folders = "|".join(sorted(x.name for x in ROOT.iterdir() if x.is_dir() and not x.name.startswith(".")))
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", without_code(page))
    made = re.compile(
        r"NAME|^(build/|benchmarks/results|runs/|dist/)|\.so$|_build_info\.json$"
    )  # by runs and builds
    assert not [x for x in named if not made.search(x) and not (ROOT / x).exists()]


def functions_of(path):
    return {
        x.name for x in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(x, ast.FunctionDef)
    }


def test_every_promise_has_tests_that_exist():
    text = (DOCS / "guarantees.md").read_text(encoding="utf-8").split("## What is not promised")[0]
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| (?!promise|---)", line)]
    assert len(rows) > 40
    for promise, named in rows:
        tests = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", named)
        assert tests and len(tests) == named.count("`") / 2, promise
        missing = [name for path, name in tests if name not in functions_of(ROOT / path)]
        assert not missing, promise


def test_one_page_says_what_has_run_on_a_gpu():
    claim = re.compile(r"no\s+GPU\s+has", re.IGNORECASE)
    sources = [*PAGES, *(ROOT / "mann_fast").rglob("*.py")]
    assert [x.name for x in sources if claim.search(x.read_text(encoding="utf-8"))] == ["gpu.md"]


def test_places_to_touch_are_counted():
    text = without_code(DOCS / "adding-an-op.md")
    counted = [int(n) for n in re.findall(r"^\| \[\d.*\| (\d+) \| \d+ \|$", text, re.MULTILINE)]
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1 : len(counted) + 1]
    assert len(counted) == 6
    assert counted == [len(re.findall(r"\n\d+\. ", section)) for section in sections]


def test_declaration_that_is_shown_is_that_of_content_read():
    (shown,) = re.findall(r"```\n(.*?)```", (DOCS / "adding-an-op.md").read_text(encoding="utf-8"), re.DOTALL)
    source = (ROOT / "mann_fast" / "ops" / "content.py").read_text(encoding="utf-8")
    assert textwrap.dedent(shown).strip() in source
