"""The modules of the package: whom they import, and what they take from one another."""

import ast
from pathlib import Path

import pytest

import mann_fast

ROOT = Path(mann_fast.__file__).parent


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("mann_fast", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(module):
    """Of a module, of all that it imports from the package, wherever it does: the module, the name there, the name here."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            source = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (source, node.module)))
            if source.split(".")[0] == "mann_fast":
                for alias in node.names:
                    yield source, alias.name, alias.asname or alias.name


@pytest.mark.once
@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_is_lent(module):
    """Of a module or of a class beyond its file; modules whose own name begins with an underscore are the package's."""
    lent, modules = [], {}
    for source, name, here in imports(module):
        if f"{source}.{name}" in MODULES:
            modules[here] = f"{source}.{name}"
        elif name.startswith("_") and not name.startswith("__"):
            lent.append(f"{source}.{name}")
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.startswith("_"):
            of = modules.get(node.value.id)
            if of and f"{of}.{node.attr}" not in MODULES and not node.attr.startswith("__"):
                lent.append(f"{of}.{node.attr}")
    assert not lent


@pytest.mark.once
def test_imports_run_one_way():
    """Of modules, also where they import late; a package's own __init__ stands for what it takes from its modules."""
    needs = {
        module: {
            f"{source}.{name}" if f"{source}.{name}" in MODULES else source
            for source, name, _ in imports(module)
        }
        for module in MODULES
    }
    done = set()

    def visit(module, way):
        assert module not in way, " imports ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in needs.get(module, ()):
                # A module of a package may import its package's names where the package imports it first.
                if not way or not module.startswith(f"{other}."):
                    visit(other, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
