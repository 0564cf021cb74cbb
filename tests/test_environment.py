"""The ways to set up agree with each other, and everything that is imported is declared."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "# "
]


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


EVERYTHING = declared(*PROJECT["optional-dependencies"])


def test_conda_sets_up_what_pip_does():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    python = next(line.removeprefix("python=") for line in conda if line.startswith("python="))
    assert environment["name"] == PROJECT["name"]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    assert pip == ["-c constraints.txt", "-e .[notebooks,test,book]"]
    extras = set(PROJECT["optional-dependencies"]) - {"download"}  # "test" has what it has
    assert set(re.search(r"\[(.*)\]", pip[1])[1].split(",")) == extras
    assert not {re.split("[ =<>]", line)[0] for line in conda} & set(EVERYTHING), "declared twice"


def test_every_constraint_pins_a_version_that_the_project_accepts():
    assert [str(constraint) for constraint in CONSTRAINTS if constraint.name == "torch"] == ["torch==2.13.0"]
    for constraint in CONSTRAINTS:
        (pin,) = constraint.specifier
        assert pin.operator == "==" and EVERYTHING[constraint.name].specifier.contains(pin.version)


def test_the_package_says_its_version():
    minisd = ast.parse((ROOT / "minisd/__init__.py").read_text())
    (version,) = [
        node.value.value for node in minisd.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert version == PROJECT["version"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]


def test_no_file_names_a_registry():
    texts = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run")]
    for path in texts:
        assert not re.search(r"https?://|--(extra-)?index-url|find-links", path.read_text()), path


def python_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code").splitlines()
    return "\n".join(line for line in lines if line[:1] not in ("%", "!"))


def third_party(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(python_of(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    ours = {"minisd", "build", "bench", *(helper.stem for helper in (ROOT / "tests").rglob("*.py"))}
    return names - ours - sys.stdlib_module_names


DISTRIBUTIONS = importlib.metadata.packages_distributions()
COURSE_ONLY = {"plots.py", "widgets.py"}  # rooms of the package that only the notebooks enter
EXTRAS = COURSE_ONLY | {"download.py"}


@pytest.mark.parametrize(
    "paths, requirements",
    [
        ([path for path in (ROOT / "minisd").rglob("*.py") if path.name not in EXTRAS], declared()),
        ([ROOT / "minisd" / name for name in COURSE_ONLY], declared("notebooks")),
        ([ROOT / "minisd" / "weights" / "download.py"], declared("download")),
        ((ROOT / "notebooks").glob("*.ipynb"), declared("notebooks")),
        ([*(ROOT / "tests").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")], declared("notebooks", "test")),
    ],
    ids=["package", "plots and widgets", "download", "chapters", "tests"],
)
def test_everything_imported_is_declared(paths, requirements):
    for path in paths:
        for name in third_party(path):
            homes = {canonicalize_name(home) for home in DISTRIBUTIONS.get(name, [name])}
            assert homes & set(requirements), f"{path.relative_to(ROOT)} imports {name}, which is not declared"


@pytest.mark.parametrize(
    "prompt", ["a cat", 'a sign that says "hello world"', '"a (cat)"', "a `echo dog`", "it's a cat; ls", "$HOME"]
)
def test_make_hands_a_prompt_on_as_it_was_written(tmp_path, prompt):
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/.ready").touch()
    command = tmp_path / ".venv/bin/minisd"
    command.write_text('#!/bin/sh\nprintf "%s" "$1"\n')
    command.chmod(0o755)
    asked = ["make", "--silent", "picture", "PROMPT=" + prompt.replace("$", "$$")]  # make's own sign
    assert subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == prompt
