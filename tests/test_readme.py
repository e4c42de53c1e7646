"""The README says what is there: its two commands, its files, its paper-to-code map."""
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    set_up = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    run_tests = ".venv/bin/python -m pytest -q -n 2 --dist loadfile tests"
    assert commands == [set_up + ".venv/bin/python adm.py", set_up + run_tests]
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_file_guide_lists_every_module_and_no_other():
    listed = set(re.findall(r"^\| `((?:models/)?[\w/]+\.py)` \|", README, re.M))
    there = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *(ROOT / "models").rglob("*.py")]}
    assert listed == {path for path in there if not path.endswith("__init__.py")}


def test_every_function_that_the_map_names_exists():
    section = README.split("## Paper to code")[1].split("\n## ")[0]
    named = re.findall(r"`([\w/]+\.py): ([\w, ]+)`", section)
    assert named
    for file, functions in named:
        source = (ROOT / file).read_text()
        for function in functions.split(", "):
            assert re.search(rf"^def {function}\(", source, re.M), (file, function)


def test_pictures_and_links_into_the_repository_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
