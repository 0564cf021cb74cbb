"""The form of a chapter: what it must hold, that it is stored run, and that it shows the package's own code."""

import ast
import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import build  # noqa: E402

CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
SECTIONS = [
    "Play",
    "What goes wrong",
    "What we measured",
    "The same in minisd",
    "Exercises",
    "The real Stable Diffusion",
    "Sources",
]
TAGS = {"same-as", "equals", "exercise", "check", "raises-exception", "nbval-ignore-output", "hide-input"}


@pytest.fixture(params=CHAPTERS, ids=[path.stem for path in CHAPTERS])
def path(request):
    return request.param


@pytest.fixture
def chapter(path):
    return nbformat.read(path, as_version=4)


def code(chapter):
    return [cell for cell in chapter.cells if cell.cell_type == "code"]


def prose(chapter):
    return "\n\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")


def tags(cell):
    """The tags of a cell as (name, argument): `same-as: samplers.heun` is ("same-as", "samplers.heun")."""
    return [tuple(part.strip() for part in tag.partition(":")[::2]) for tag in cell.metadata.get("tags", [])]


def tagged(chapter, name):
    return [(cell, argument) for cell in code(chapter) for tag, argument in tags(cell) if tag == name]


def python(cell):
    """The syntax tree of a cell, lines of shell and magic left out."""
    return ast.parse("\n".join("" if line[:1] in ("%", "!") else line for line in cell.source.splitlines()))


def test_there_are_chapters():
    assert CHAPTERS and all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name) for path in CHAPTERS)


# The form


def test_it_opens_with_where_the_reader_stands(path, chapter):
    opening = chapter.cells[0].source
    assert chapter.cells[0].cell_type == "markdown" and opening.startswith(f"# {path.name[:2]} ")
    assert re.search(r"\d+ (seconds|minutes?)", opening), "the time to run stands in the first cell"
    assert "assume" in opening.lower(), "what is assumed stands in the first cell"
    here = CHAPTERS.index(path)
    for neighbour in CHAPTERS[max(here - 1, 0) : here] + CHAPTERS[here + 1 : here + 2]:
        assert f"({neighbour.name})" in opening, f"no link to {neighbour.name} in the first cell"


def test_it_has_every_section_in_order(chapter):
    headings = re.findall(r"^## (.+)$", prose(chapter), re.MULTILINE)
    found = [next((i for i, heading in enumerate(headings) if heading.startswith(s)), None) for s in SECTIONS]
    assert None not in found, (
        f"no section {[s for s, i in zip(SECTIONS, found, strict=True) if i is None]} in {headings}"
    )
    assert found == sorted(found)


def test_it_lets_the_reader_play(chapter):
    assert any("explorer(" in cell.source for cell in code(chapter))


def test_it_proves_that_the_package_does_the_same(chapter):
    assert tagged(chapter, "same-as") or tagged(chapter, "equals")


def test_its_three_exercises_are_checked_and_solved(chapter):
    assert len(re.findall(r"^### Exercise \d", prose(chapter), re.MULTILINE)) == 3
    assert len(tagged(chapter, "exercise")) == len(tagged(chapter, "check")) == 3
    assert len(build.solved_exercises(chapter)) == 3, "after each check, a folded solution: <details> with ```python"
    for cell, _ in tagged(chapter, "check"):
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert said and not said.startswith("Right"), f"the check of an unsolved exercise says {said!r}"


def test_its_tags_are_known(chapter):
    assert {name for cell in chapter.cells for name, _ in tags(cell)} <= TAGS


def test_its_links_lead_somewhere(chapter):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(chapter)):
        if not re.match(r"https?://|#", link):
            assert (NOTEBOOKS / link.partition("#")[0]).exists(), link


def test_nothing_is_loaded_from_the_web(chapter):
    texts = [cell.source for cell in chapter.cells]
    texts += [str(output.get("data", {}).get("text/html", "")) for cell in code(chapter) for output in cell.outputs]
    for text in texts:
        assert not re.search(r"!\[[^]]*\]\(\s*http|<(img|script|iframe|link)[^>]+(src|href)=.?http|url=.http", text), (
            text
        )


def test_no_cell_hides_an_error(chapter):
    for cell in code(chapter):
        hidden = [node for node in ast.walk(python(cell)) if isinstance(node, ast.Try | ast.TryStar)]
        assert not hidden, cell.source


# Stored run, and always the same bytes


def test_it_is_stored_as_it_is_built(path, chapter):
    stored = path.read_text(encoding="utf-8")
    assert build.dumps(build.normalise(chapter, path.name)) == stored, "run notebooks/build.py"
    assert len(stored.encode()) < 900_000
    assert str(ROOT) not in stored


def test_every_cell_has_run_and_none_has_failed(chapter):
    assert [cell.execution_count for cell in code(chapter)] == list(range(1, len(code(chapter)) + 1))
    assert any(cell.outputs for cell in code(chapter))
    for cell in code(chapter):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in cell.metadata.get("tags", [])), cell.source


def test_its_text_form_gives_the_same_chapter(path, chapter, tmp_path, capsys):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    build.to_text(copy)
    build.from_text(copy.with_suffix(".py"))
    again = nbformat.read(copy, as_version=4)
    assert [(c.cell_type, c.source, c.metadata, c.get("outputs")) for c in again.cells] == [
        (c.cell_type, c.source, c.metadata, c.get("outputs")) for c in chapter.cells
    ]


def test_a_cell_that_was_changed_in_its_text_form_loses_its_output(tmp_path, capsys):
    path = tmp_path / "07_x.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in ("print(1 + 1)", "print(2 + 2)")]
    for cell, text in zip(cells, "24", strict=True):
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    build.to_text(path)
    script = path.with_suffix(".py")
    script.write_text(script.read_text(encoding="utf-8").replace("2 + 2", "2 + 3"), encoding="utf-8")
    build.from_text(script)
    first, second = nbformat.read(path, as_version=4).cells
    assert first.outputs[0].text == "2" and second.source == "print(2 + 3)" and not second.outputs


# One text with the package


class Bare(ast.NodeTransformer):
    """Takes docstrings and annotations out of a tree: a chapter may say less about shapes, not do another thing."""

    def _visit_scope(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self._visit_scope(node)

    visit_ClassDef = _visit_scope

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        return ast.Assign([node.target], node.value) if node.value else ast.Expr(node.target)


def bare(node):
    return ast.unparse(ast.fix_missing_locations(Bare().visit(node)))


def definition(tree, names):
    """The function or class `Name.method` of a syntax tree, or None."""
    for name in names:
        named = [node for node in tree.body if getattr(node, "name", None) == name]
        if not named:
            return None
        (tree,) = named
    return tree


def in_package(dotted):
    """The definition that `samplers.heun` or `critters.field.Field.distance` names in minisd."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        file = ROOT / "minisd" / Path(*parts[:cut]).with_suffix(".py")
        if file.exists():
            return definition(ast.parse(file.read_text(encoding="utf-8")), parts[cut:])
    return None


def test_same_as_cells_hold_the_code_of_the_package(chapter):
    for cell, name in tagged(chapter, "same-as"):
        theirs = in_package(name)
        assert theirs is not None, f"there is no minisd.{name}"
        ours = definition(python(cell), [name.split(".")[-1]])
        assert ours is not None, f"the cell defines no {name.split('.')[-1]}"
        assert bare(ours) == bare(theirs)


def test_equals_cells_assert_their_equality(chapter):
    for cell, name in tagged(chapter, "equals"):
        assert in_package(name) is not None, f"there is no minisd.{name}"
        asserted = [node for node in ast.walk(python(cell)) if isinstance(node, ast.Assert)]
        assert asserted or "assert_close" in cell.source, cell.source


# The rules themselves


def test_bare_code_differs_only_where_it_does_another_thing():
    stated = (
        'def f(x: Float[Tensor, "b"], k: int = 2) -> Tensor:\n    """Doc."""\n    y: int = k\n    return x * y  # why'
    )
    assert bare(ast.parse(stated)) == bare(ast.parse("def f(x, k=2):\n    y = k\n    return x * y"))
    assert bare(ast.parse(stated)) != bare(ast.parse("def f(x, k=3):\n    y = k\n    return x * y"))


def test_the_build_takes_out_what_differs_from_run_to_run():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 99).convert("RGB").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    cell = nbformat.v4.new_code_cell(
        "f()", metadata={"execution": {"start": "now"}, "tags": ["check"]}, execution_count=9
    )
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="a"),
        nbformat.v4.new_output("stream", name="stdout", text=f"b <f at 0x7f12345678> {ROOT}/minisd/vae.py"),
        nbformat.v4.new_output("display_data", {build.LIVE: {"model_id": "1f"}, "image/png": picture}),
    ]
    notebook = nbformat.v4.new_notebook(
        metadata={"language_info": {"name": "python", "version": "3.11.7"}}, cells=[cell]
    )
    done = build.normalise(notebook, "07_x.ipynb")
    assert "version" not in str(done.metadata)
    assert (cell.id, cell.execution_count, cell.metadata) == ("07-000", 1, {"tags": ["check"]})
    printed, shown = cell.outputs
    assert printed.text == "ab <f at 0x0> minisd/vae.py"
    assert build.LIVE not in shown.data
    stored = Image.open(io.BytesIO(base64.b64decode(shown.data["image/png"])))
    assert stored.mode == "P" and len(stored.getcolors()) <= build.COLORS
    before = build.dumps(done)
    assert build.dumps(build.normalise(done, "07_x.ipynb")) == before


def test_timings_keep_what_is_stored_until_something_else_changes():
    def chapter(seconds, printed):
        cells = [
            nbformat.v4.new_code_cell("work()", metadata={"tags": ["nbval-ignore-output"]}),
            nbformat.v4.new_code_cell("f()"),
        ]
        for cell, text in zip(cells, (seconds, printed), strict=True):
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        return nbformat.v4.new_notebook(cells=cells)

    for printed, kept in [("7", "1.0 s"), ("8", "2.0 s")]:
        new = chapter("2.0 s", printed)
        build.keep_ignored_outputs(new, chapter("1.0 s", "7"))
        assert new.cells[0].outputs[0].text == kept
    new, old = chapter("2.0 s", "7"), chapter("1.0 s", "7")
    old.cells[0].outputs = []  # as when its source has changed
    build.keep_ignored_outputs(new, old)
    assert new.cells[0].outputs[0].text == "2.0 s"


def test_a_solution_is_its_python_blocks_followed_by_the_check():
    cells = [
        nbformat.v4.new_markdown_cell("### Exercise 1"),
        nbformat.v4.new_code_cell("x = ...", metadata={"tags": ["exercise"]}),
        nbformat.v4.new_code_cell("check(x)", metadata={"tags": ["check"]}),
        nbformat.v4.new_markdown_cell(
            "<details><summary>Solution</summary>\n\n```python\nx = 1\n```\n\nsince\n</details>"
        ),
    ]
    assert build.solved_exercises(nbformat.v4.new_notebook(cells=cells)) == ["x = 1\n\ncheck(x)"]
