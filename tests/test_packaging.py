"""The package as it is installed: version, files, build record, and what the extension asks of torch."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import needs_cpp

import mann_fast

PACKAGE = Path(mann_fast.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
in_source_tree = pytest.mark.skipif(
    not (ROOT / "scripts").is_dir(), reason="needs the source tree, which is not beside these tests"
)


@pytest.fixture
def native(monkeypatch):
    """scripts/native.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import native

    return native


@pytest.fixture
def due(monkeypatch):
    """scripts/due.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import due

    return due


def test_version_and_typing_marker():
    assert importlib.metadata.version("mann_fast") == mann_fast.__version__
    assert (PACKAGE / "py.typed").exists()


def test_build_record_agrees_with_what_is_there():
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    of_cuda = {"cuda", "cuda_reason", "architectures"}
    assert set(info) == {"extension", "reason", "torch", "compiler", "isas"} | of_cuda
    assert (
        (info["cuda"] is not None) == (PACKAGE / "_C_cuda.abi3.so").exists() == (info["cuda_reason"] is None)
    )
    assert bool(info["architectures"]) == (info["cuda"] is not None)
    assert info["extension"] == (PACKAGE / "_C.abi3.so").exists()
    if info["extension"]:
        assert info["reason"] is None
        assert info["isas"][0] == "baseline"
        assert info["torch"] and info["compiler"]
    else:
        assert info["reason"]
        assert mann_fast.backends()["cpp"] is not None


@needs_cpp
def test_extension_names_no_folder_of_the_machine_that_built_it():
    text = (PACKAGE / "_C.abi3.so").read_bytes()
    assert b"csrc/bindings.cpp" in text
    for place in {str(ROOT), str(Path.home()), sys.prefix}:
        assert len(place) < 5 or place.encode() not in text


@in_source_tree
def test_abi_check_finds_symbols_that_it_must_refuse(tmp_path):
    """A library that calls into torch's C++, and an object whose inline function others might be given."""
    if not shutil.which("g++") or not shutil.which("nm"):
        pytest.skip("needs g++ and nm")
    source = tmp_path / "bad.cpp"
    source.write_text(
        "namespace c10 { void warn(int); }\n"
        'extern "C" void aoti_torch_of_a_later_release();\n'
        "inline __attribute__((noinline)) int shared(int x) { return x + 1; }\n"
        "namespace mann_fast::avx2 { int table(int x) {\n"
        "  c10::warn(x); aoti_torch_of_a_later_release(); return shared(x); } }\n"
    )
    (tmp_path / "objects").mkdir()
    hidden, target = tmp_path / "objects" / "content_avx2.o", tmp_path / "bad.so"
    compile_only = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-c", source, "-o", hidden]
    subprocess.run(compile_only, check=True)
    subprocess.run(["g++", "-shared", hidden, "-o", target], check=True)
    script = ROOT / "scripts" / "check_abi.py"
    done = subprocess.run(
        [sys.executable, script, target, tmp_path / "objects"], capture_output=True, text=True
    )
    assert done.returncode == 1
    problems = done.stderr.splitlines()
    assert len(problems) == 3
    assert "needs aoti_torch_of_a_later_release, which torch 2.11 does not have" in done.stderr
    assert "needs _ZN3c104warnEi, neither" in done.stderr
    assert "defines _Z6sharedi (W)" in done.stderr


@in_source_tree
def test_objects_are_compiled_again_only_if_something_changed(native, tmp_path, monkeypatch):
    try:
        compiler = native.Compiler()
    except native.CannotBuild as problem:
        pytest.skip(str(problem))
    header, source = tmp_path / "a header.h", tmp_path / "a.cpp"
    header.write_text("constexpr int one = 1;\n")
    source.write_text('#include "a header.h"\nint f() { return one; }\n')
    runs = []
    monkeypatch.setattr(compiler, "run", lambda arguments, run=compiler.run: runs.append(1) or run(arguments))

    def compiled(*flags):
        before = len(runs)
        (object_file,) = compiler.compile([native.Unit(str(source), "a", list(flags))], tmp_path / "objects")
        assert object_file.exists()
        return len(runs) > before

    assert compiled()
    assert not compiled()
    header.touch()  # the same content, as after a checkout to and fro
    assert not compiled()
    header.write_text("constexpr int one = 2 - 1;\n")
    assert compiled()
    assert compiled("-g")
    assert not compiled("-g")
    source.write_text("int f() { return two; }\n")
    with pytest.raises(native.CannotBuild, match="two"):
        compiled("-g")
    source.write_text("int f() { return 2; }\n")
    assert compiled("-g")


@in_source_tree
def test_objects_of_another_build_serve_if_made_of_the_same_by_the_same_command(
    native, tmp_path, monkeypatch, capsys
):
    try:
        compiler = native.Compiler()
    except native.CannotBuild as problem:
        pytest.skip(str(problem))
    unit = native.Unit("csrc/a.cpp", "a", [])

    def tree(name, header="constexpr int one = 1;\n"):
        csrc = tmp_path / name / "csrc"
        csrc.mkdir(parents=True)
        (csrc / "a.h").write_text(header)
        (csrc / "a.cpp").write_text(
            '#include "../csrc/a.h"\nconst char* f(int i) { return i == one ? __FILE__ : ""; }\n'
        )
        return tmp_path / name

    def compiled(root, *flags, others=None):
        """The object, and whether it was compiled here."""
        monkeypatch.setattr(native, "ROOT", root)
        monkeypatch.setenv("MANN_FAST_OBJECTS", str(others or ""))
        (object_file,) = compiler.compile([unit], root / "objects", list(flags))
        assert not [x for x in (root / "objects").iterdir() if x.is_dir()]
        return object_file.read_bytes(), "seconds" in capsys.readouterr().out

    first = tree("first")
    objects = first / "objects"
    whole, here = compiled(first)
    assert here
    assert compiled(tree("alone")) == (whole, True)  # so it does not matter where one was compiled
    second = tree("second")
    assert compiled(second, others=objects) == (whole, False)
    assert compiled(second) == (whole, False)  # the copy is up to date without the other build
    assert compiled(tree("flags"), "-DX", others=objects)[1]
    assert compiled(tree("header", "constexpr int one = 2;\n"), others=objects)[1]
    assert compiled(tree("nothing there"), others=tmp_path / "nowhere") == (whole, True)
    (objects / "a.o").write_bytes(whole[:-1])  # of a build that has just replaced it, say
    assert compiled(tree("replaced"), others=objects) == (whole, True)
    assert compiled(first) == (whole, True)


@in_source_tree
def test_an_object_whose_source_changed_meanwhile_is_compiled_again(native, tmp_path, monkeypatch):
    try:
        compiler = native.Compiler()
    except native.CannotBuild as problem:
        pytest.skip(str(problem))
    source, runs = tmp_path / "a.cpp", []
    source.write_text("int f() { return 1; }\n")

    def run(arguments, run=compiler.run):
        runs.append(1)
        log = run(arguments)
        if len(runs) == 1:
            source.write_text("int f() { return 2; }\n")
        return log

    monkeypatch.setattr(compiler, "run", run)
    for expected in (1, 2, 2):
        compiler.compile([native.Unit(str(source), "a", [])], tmp_path / "objects")
        assert len(runs) == expected


@in_source_tree
def test_a_library_is_linked_again_only_if_something_changed(native, tmp_path):
    try:
        compiler = native.Compiler()
    except native.CannotBuild as problem:
        pytest.skip(str(problem))
    source, target = tmp_path / "a.cpp", tmp_path / "lib" / "a.so"
    source.write_text("int f() { return 1; }\n")

    def linked(*arguments):
        before = target.stat().st_mtime_ns if target.exists() else 0
        objects = compiler.compile([native.Unit(str(source), "a", [])], tmp_path / "objects")
        compiler.link(target, objects, list(arguments), tmp_path / "objects")
        return target.stat().st_mtime_ns > before

    assert linked()
    assert not linked()
    assert linked("-Wl,--as-needed")
    assert not linked("-Wl,--as-needed")
    source.write_text("int f() { return 2; }\n")
    assert linked("-Wl,--as-needed")
    target.unlink()
    assert linked("-Wl,--as-needed")


@in_source_tree
def test_cuda_kernels_are_built_for_the_gpus_of_the_machine_unless_asked(native, tmp_path, monkeypatch):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '9.0\\n6.1\\n8.6\\n9.0\\n'\n")
    driver.chmod(0o755)
    for name in ("MANN_FAST_CUDA", "MANN_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(native.CannotBuild, match="no NVIDIA GPU of sm_80 or newer was found"):
        native.cuda_architectures()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.cuda_architectures() == ["86", "90"]
    driver.write_text("#!/bin/sh\necho no driver; exit 9\n")
    with pytest.raises(native.CannotBuild, match="no NVIDIA GPU of sm_80 or newer was found"):
        native.cuda_architectures()
    monkeypatch.setenv("MANN_FAST_CUDA", "1")
    assert native.cuda_architectures() == ["80", "90", "100"]
    monkeypatch.setenv("MANN_FAST_CUDA_ARCHS", "100, 90")
    assert native.cuda_architectures() == ["90", "100"]
    monkeypatch.setenv("MANN_FAST_CUDA", "0")
    with pytest.raises(native.CannotBuild, match="MANN_FAST_CUDA=0 asked"):
        native.cuda_architectures()
    monkeypatch.setenv("MANN_FAST_CUDA", "yes")
    with pytest.raises(native.CannotBuild, match="MANN_FAST_CUDA must be 0 or 1, got 'yes'"):
        native.cuda_architectures()


@in_source_tree
def test_a_compiler_that_cannot_be_used_is_named(native, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.CannotBuild, match="no C\\+\\+ compiler was found .*no-such-compiler"):
        native.Compiler()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.CannotBuild, match="'false' does not answer --version"):
        native.Compiler()


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
in_repository = pytest.mark.skipif(
    not WORKFLOWS, reason="needs the repository, which is not beside these tests"
)


@in_repository
def test_the_version_stands_in_the_changelog_and_in_the_citation():
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [mann_fast.__version__]
    headings = re.findall(r"^## ([^,\n]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", mann_fast.__version__)
    assert mann_fast.__version__ not in headings[1:]


@in_repository
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_make_targets_and_scripts_that_exist(workflow):
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    commands = " ".join(step.get("run", "") for step in steps)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"make (?:--\S+ (?:\d+ )?)*(\w+)", commands)
    assert set(named) <= set(targets.split())
    scripts = re.findall(r"(?:scripts|benchmarks)/[\w.]+", commands)
    assert all((ROOT / script).exists() for script in scripts)
    assert named or scripts


@in_repository
def test_issue_templates_are_forms_of_github():
    yaml = pytest.importorskip("yaml")
    forms = {
        x.stem: yaml.safe_load(x.read_text(encoding="utf-8"))
        for x in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")
    }
    assert forms.pop("config") == {"blank_issues_enabled": True}
    assert set(forms) == {"bug", "feature", "gpu"}
    for form in forms.values():
        assert form["name"] and form["description"]
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert ids and len(ids) == len(set(ids))


@in_repository
def test_a_release_is_checked_and_names_the_repository(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import release

    (tmp_path / "mann_fast").mkdir()
    for name in ("README.md", "pyproject.toml", "CHANGELOG.md", "mann_fast/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    address, tag = "https://example.org/them/it", f"v{mann_fast.__version__}"
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("# Changes\n\n## Unreleased\n")
    with pytest.raises(SystemExit, match='CHANGELOG.md begins with "Unreleased"'):
        release.main(address, tag, tmp_path)
    changes.write_text(f"# Changes\n\n## {mann_fast.__version__}, 1 January 2027\n")
    with pytest.raises(SystemExit, match="the tag is v9, but mann_fast.__version__ is"):
        release.main(address, "v9", tmp_path)
    release.main(address, tag, tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"]({address}/raw/{tag}/docs/speed.png)" in readme
    assert f"]({address}/blob/{tag}/docs/rl.md#ppo-in-one-file)" in readme
    assert f"git clone {address}.git mann_fast" in readme
    assert not re.search(r"\]\((?!https://)", readme)
    project = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.urls]\nRepository = "{address}"\n' in project


@in_repository
def test_what_is_due_follows_the_contents_of_files(due, tmp_path, monkeypatch, capsys):
    """`make due`: all that never passed, then nothing, then the parts and tests of which a file is other than it was."""
    for name in {name for names in due.PARTS.values() for name in names}:
        file = tmp_path / name if Path(name).suffix else tmp_path / name / "some.cpp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        assert (ROOT / name).exists()
    (tmp_path / ".ci").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text("")
    monkeypatch.setattr(due, "ROOT", tmp_path)
    monkeypatch.setattr(due, "PASSED", tmp_path / ".ci" / "passed.json")
    monkeypatch.setattr(due, "why_skipped", lambda name: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["due.py", *arguments])
        due.main()
        return set(capsys.readouterr().out.split())

    parts = set(due.PARTS)
    assert run("tests/test_some.py") == parts | {"tests/test_some.py"} and run("--nightly") == parts
    assert run("--passed", "check", "cuda", "triton") == set()
    assert run() == parts - {"cuda", "triton"}
    run("--passed", "check", *due.PARTS, "tests/test_some.py")
    assert run("tests/test_some.py") == set() and run("--nightly") == parts
    (tmp_path / "kernels" / "another.py").write_text("")
    (tmp_path / "tests" / "test_some.py").write_text("assert True")
    assert run("tests/test_some.py") == {"triton", "tests/test_some.py"}
    (tmp_path / "kernels" / "another.py").unlink()
    assert run() == set()
    (tmp_path / "csrc" / "include" / "some.cpp").write_text("")
    assert run() == {"isas", "instructions", "cuda", "emulate", "sanitize-cpu", "sanitize-cuda"}
    with pytest.raises(FileNotFoundError, match="test_other.py"):
        run("tests/test_other.py")
    skipped = {
        "cuda": "no nvcc",
        "instructions": "valgrind is not installed",
    }  # what was skipped has not passed
    monkeypatch.setattr(due, "why_skipped", skipped.get)
    run("--passed", "check", *due.PARTS)
    assert run() == set(skipped)


@in_repository
def test_the_instruction_sets_of_this_processor_are_those_that_torch_finds(native):
    """What `make demo` builds for is by the names of Linux, what the kernels take by the compiler's: a build for another
    instruction set than the processor's best would not run, or be slow."""
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform != "linux" or capability not in ("DEFAULT", "AVX2", "AVX512"):
        pytest.skip(f"no x86-64 under Linux: {capability}")
    known = native.ISA_FLAGS["x86_64"]
    expected = ["baseline", "avx2", "avx512"][: ["DEFAULT", "AVX2", "AVX512"].index(capability) + 1]
    assert native.isas_here(known) == expected


@in_repository
def test_instruction_sets_are_chosen_by_name(native, monkeypatch):
    known = ["baseline", "avx2", "avx512"]
    for asked, chosen in (("", known), ("avx512, baseline", ["baseline", "avx512"])):
        monkeypatch.setenv("MANN_FAST_ISAS", asked)
        assert native.chosen_isas(known) == chosen
    monkeypatch.setenv("MANN_FAST_ISAS", "native")
    assert native.chosen_isas(known) == native.isas_here(known)[-1:]
    monkeypatch.setenv("MANN_FAST_ISAS", "sse9")
    with pytest.raises(native.CannotBuild, match="MANN_FAST_ISAS must be native or some of .*, got 'sse9'"):
        native.chosen_isas(known)


@in_repository
def test_every_kernel_belongs_to_a_part_of_make_check(due):
    named = tuple(name for names in due.PARTS.values() for name in names)
    sources = [x.relative_to(ROOT).as_posix() for x in [*ROOT.glob("csrc/*/*"), *ROOT.glob("kernels/*.py")]]
    # What lies between torch and the kernels is the same for all of them: make test goes through it.
    assert [x for x in sources if not x.startswith((*named, "csrc/bindings/"))] == []
