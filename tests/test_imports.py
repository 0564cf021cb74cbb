"""Imports run one way through the package, and `import minisd` costs torch and little else."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minisd"

# A room imports from rooms before it, never from one behind it.
ORDER = """
    config checks devices files samplers toy image
    schedule
    layers
    tokenizer prompt clip vae unet classifier depth denoiser hooks
    weights
    adapters
    settings
    pipeline
    train
    critters evaluate
    plots widgets
    __init__ __main__
""".split()
ALONE = {"samplers": set(), "critters": {"image", "config", "layers"}}  # these know less than the order lets them
WORKSHOP = {"data", "oracle", "recipes", "stages", "workshop"}  # where the world meets the models: not alone
PEERS = {"diffusers", "transformers", "notebooks", "tests"}


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, also inside its functions: `minisd.layers.Attention`."""
    names = set()
    package = ["minisd", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_run_one_way(path):
    here = room(path)
    assert here in ORDER, f"{here} has no place in the order"
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in PEERS, f"{path} imports {name}"
        if top != "minisd" or here == "__init__":
            continue
        there = rest[0] if rest and rest[0] in ORDER else "__init__"
        if there != here:
            assert ORDER.index(there) < ORDER.index(here), f"{here} imports {there}, which stands behind it"
            alone = {} if path.stem in WORKSHOP else ALONE
            assert there in alone.get(here, {there}), f"{here} imports {there}"


def test_the_order_names_no_room_twice():
    assert len(ORDER) == len(set(ORDER))


def test_import_minisd_costs_torch_and_little_else():
    heavy = [
        "matplotlib",
        "ipywidgets",
        "IPython",
        "click",
        "rich",
        "diffusers",
        "transformers",
        "huggingface_hub",
    ]
    assert all(importlib.util.find_spec(name) for name in heavy)  # else this test couldn't fail
    code = f"import json, sys, minisd; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert json.loads(loaded) == []
