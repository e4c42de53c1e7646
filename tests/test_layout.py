"""The rooms of models/: which may import which, and how long a file may be."""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from conftest import ROOT

ROOMS = ("root", "eval", "job", "tiny")  # a room imports from itself and from those before it
DENOISERS = {"mmdit", "sdxl_unet", "cogvideox", "animatediff", "wan"}
NETWORKS = DENOISERS | {"vae", "cogvideox_vae", "wan_vae"}
BUDGETS = {"scripts": 300, "networks": 300, "root": 350, "job": 350, "eval": 400, "tiny": 350}  # lines
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in (ROOT / "models").rglob("*.py")}


def room(module: str) -> str:
    """models.eval.shapes -> eval, models.eval -> eval, models.data -> root."""
    part = (module.split(".") + [""])[1]
    return part if part in ROOMS else "root"


def imports(path: Path) -> set[str]:
    """What a file imports anywhere, in functions too: modules of models/ and scripts."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            within = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= within or {node.module}
    return names & (MODULES.keys() | SCRIPTS.keys())


GRAPH = {module: imports(path) for module, path in MODULES.items()}


def test_the_parser_sees_imports_in_functions_and_of_modules(tmp_path):
    (tmp_path / "x.py").write_text("from models.eval import shapes, fvd\nimport models.data, adm\n"
                                   "def f():\n    from models.text import Cond\n    import numpy\n")
    assert imports(tmp_path / "x.py") == {"models.eval.shapes", "models.eval.fvd", "models.data", "models.text", "adm"}
    assert [room(name) for name in ("models", "models.data", "models.eval", "models.tiny.images")] == \
        ["root", "root", "eval", "tiny"]


def test_rooms_import_one_way():
    against = [f"{module} imports {other}" for module, others in sorted(GRAPH.items()) for other in sorted(others)
               if other in SCRIPTS or ROOMS.index(room(other)) > ROOMS.index(room(module))]
    assert not against


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_what_is_copied_alone_needs_no_denoiser():
    """The modules beside the denoisers serve all of them; SD1.5's UNet is AnimateDiff's."""
    found = {(module, other) for module, others in GRAPH.items() if room(module) == "root"
             for other in others if other.removeprefix("models.") in DENOISERS}
    assert found <= {("models.animatediff", "models.sdxl_unet")}


def test_no_script_imports_another():
    assert not [f"{name} imports {other}" for name, path in SCRIPTS.items() for other in imports(path) if other in SCRIPTS]


def test_no_file_is_longer_than_its_budget():
    """Prints the file guide's line counts: `pytest -s tests/test_layout.py`."""
    over = []
    for path in sorted([*SCRIPTS.values(), *MODULES.values()]):
        name, lines = path.relative_to(ROOT), len(path.read_text().splitlines())
        module = ".".join(name.with_suffix("").parts)
        kind = ("scripts" if module in SCRIPTS else "networks" if name.stem in NETWORKS and room(module) == "root"
                else room(module))
        print(f"{lines:4} of {BUDGETS[kind]} {name}")
        if lines > BUDGETS[kind]:
            over.append(f"{name} {lines} of {BUDGETS[kind]}")
    assert not over
