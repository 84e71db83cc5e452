"""What holds for the package as a whole: laziness, public names, import directions, packaged files, no stray printing."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "patchlab"
HEAVY = ("torch", "pandas", "plotly", "transformers", "transformer_lens", "xarray")

# Imports point from right to left: a module may import those of its own rank and of the ranks before it.
RANKS = (
    {"errors"},
    {"store", "progress", "tables", "terminal", "labelled", "grammar", "digest", "versions", "host", "hub"},
    {"sites", "graph", "metrics", "stats"},
    {"scores"},
    {"adapters"},
    {"sources", "interventions", "rules"},
    {"engine"},
    {"tasks", "models", "texts"},
    {"features"},
    {"methods", "lenses"},
    {"comparison", "circuits", "depth", "layer_metrics", "weight_edit", "generation"},
    {"plots", "sweeps", "feature_comparison"},
    {"recipes"},
    {"report", "explorer"},
    {"cli"},
    {"__main__"},
)
# testing is for tests: it may import anything and nothing imports it
FREE = {"testing"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(path: Path) -> set[str]:
    """Full names of the patchlab modules that a file imports, wherever in the file."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            modules = {f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}")}
            names |= {f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"} if base == "patchlab" else {base, *modules}
    return {name for name in names if name.split(".")[0] == "patchlab"}


def noun(module: str) -> str:
    """The part directly below patchlab: patchlab.rules.composites -> rules."""
    return module.split(".")[1] if "." in module else ""


def rank(name: str) -> int:
    found = [i for i, names in enumerate(RANKS) if name in names]
    assert found, f"patchlab/{name} has no place in the import order; add it to RANKS"
    return found[0]


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_one_way(path):
    own = noun(module_name(path))
    if own in ("", *FREE):
        return
    for target in sorted(noun(name) for name in imported(path)):
        assert target not in FREE, f"{own} imports patchlab.{target}, which is for tests"
        if target != "":
            assert rank(target) <= rank(own), f"{own} imports {target}, which comes later in the order"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_float64_of_a_device_is_taken_in_one_place(path):
    """Apple's GPUs have none: what needs it says ``precise(tensor)`` or ``to_array(tensor)`` of patchlab.host instead of ``tensor.double()``."""
    if noun(module_name(path)) not in ("host", *FREE):
        calls = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute) and node.attr == "double"]
        assert not calls, f"{path.name}, lines {calls}: use precise or to_array of patchlab.host, which work on devices without float64"


def test_nouns_of_one_rank_do_not_import_each_other_in_a_circle():
    edges = {(noun(module_name(path)), noun(name)) for path in modules() for name in imported(path)}
    for names in RANKS:
        circular = {(a, b) for a, b in edges if a in names and b in names and a < b and (b, a) in edges}
        assert not circular


def in_circles(imports: dict[str, set[str]]) -> set[str]:
    """The modules that stand in a circle of imports, or on one."""
    left = dict(imports)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return set(left)


def test_modules_do_not_import_each_other_in_a_circle():
    imports = {module_name(path): imported(path) - {module_name(path)} for path in modules()}
    imports["patchlab.tasks.task"].remove("patchlab.tasks.load")  # Task.from_pairs, when it is called
    assert not in_circles(imports)


def test_circles_of_imports_are_seen():
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set(), "e": {"d"}}) == {"a", "b", "c"}


def test_import_order_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "patchlab" / "rules" / "x.py"
    path.parent.mkdir(parents=True)
    forms = [
        "import patchlab.a.b",
        "from patchlab import c",
        "from patchlab.d import e",
        "def f(): from ..g import h",
        "from . import i",
        "import os",
    ]
    path.write_text("\n".join(forms))
    assert {noun(name) for name in imported(path)} == {"a", "c", "d", "g", "rules"}


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_only_the_command_line_prints(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert noun(module_name(path)) == "cli" or not calls, f"print() in line {calls[0].lineno}"


HOOKS = {"add_hook", "add_perma_hook", "hooks", "run_with_hooks", "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"}


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_only_the_engine_adds_hooks_to_a_model(path):
    if noun(module_name(path)) in {"engine", *FREE}:
        return
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in HOOKS]
    assert not calls, f"{ast.unparse(calls[0])} in line {calls[0].lineno}; say it as a Program and let engine.run add the hook"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_modules_stay_of_readable_size(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, "split it: past that it is two nouns"


def loaded_after(code: str) -> set[str]:
    code += "\nimport sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import patchlab; patchlab.__version__; dir(patchlab)",
        "import patchlab.cli",
        "import patchlab.sweeps.file",
        "import sys; from patchlab.cli import app; app(['--help'], standalone_mode=False)",
        "import sys; from patchlab.cli import app; app(['compare', '--help'], standalone_mode=False)",
        "import sys; from patchlab.cli import app; app(['sites'], standalone_mode=False)",
    ],
)
def test_importing_and_asking_for_help_stay_light(code):
    loaded = loaded_after(code)
    assert "patchlab" in loaded
    assert not loaded & set(HEAVY)


def test_using_a_name_loads_what_it_needs():
    assert "torch" in loaded_after("import patchlab; patchlab.Metric"), "else the test above could not fail"


def test_public_names_resolve_and_are_listed():
    import patchlab as pl

    assert set(pl.__all__) == set(dir(pl))
    assert len(pl.__all__) <= 32
    for name in pl.__all__:
        assert getattr(pl, name) is not None
    assert pl.__version__ == metadata.version("patchlab")
    with pytest.raises(AttributeError, match="module 'patchlab' has no attribute 'load_modle'"):
        pl.load_modle  # noqa: B018


def test_names_for_type_checkers_are_the_lazy_names():
    import patchlab as pl

    block = next(node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If))
    named = {
        alias.asname: (node.module or "").removeprefix("patchlab").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named == pl._HOMES


def test_compare_is_the_function_also_after_its_module_was_imported():
    import patchlab as pl

    module = importlib.import_module("patchlab.comparison.compare")
    assert pl.compare is module.compare


def test_packaged_models_and_typing_marker_are_in_the_package():
    assert (files("patchlab") / "py.typed").is_file()
    for name in ("demo-gpt2", "demo-llama", "demo-gpt2-4l"):
        folder = files("patchlab") / "models" / "demo" / name
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
            assert (folder / file).is_file(), f"{name}/{file}"


def test_constraints_name_the_direct_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    wanted = {re.match(r"[\w-]+", name)[0].lower() for name in [*project["dependencies"], *extras]}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    assert wanted == {name.lower() for name in pinned}
    for name in extras:
        if "==" in name:
            tool, version = name.split("==")
            assert pinned[tool.split("[")[0]] == version


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert len(links) > 10 or page != "README.md"
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_models_bridges_and_architectures_have_their_types(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.arg) and node.arg in ("model", "bridge", "arch") and node.annotation is not None:
            assert ast.unparse(node.annotation) != "Any", (
                f"line {node.lineno}: say which of the types of patchlab.adapters or of TransformerLens it is"
            )


KINDS_OF_CELLS = {"edges", "nodes", "writer", "reader"}
# these speak of edges by their nature: sets of edges patched at once
OF_EDGES = {"patchlab.methods.path_patching"}


@pytest.mark.parametrize(
    "path", [path for path in modules() if noun(module_name(path)) in ("methods", "comparison", "stats", "store")], ids=module_name
)
def test_only_a_kind_of_cells_knows_its_name(path):
    name = module_name(path)
    if name.startswith("patchlab.methods.cells") or name in OF_EDGES:
        return
    found = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and node.value in KINDS_OF_CELLS]
    assert not found, f"{name} names a kind of cells, or an axis of one, in line {found[0].lineno}: ask the kind (methods/cells/kind.py)"
