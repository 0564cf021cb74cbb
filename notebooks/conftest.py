"""The chapters under nbval: the environment their outputs were stored under, and the folded solutions tried out."""

import os
from collections import defaultdict

import nbformat
from build import ENVIRONMENT, solved_exercises
from nbval.plugin import IPyNbCell, IPyNbFile

os.environ.update(ENVIRONMENT)

TRY = """
from IPython.utils.capture import capture_output
with capture_output() as said:
    get_ipython().run_cell({source!r}).raise_error()
assert said.stdout.startswith("Right"), said.stdout
"""


def solutions(chapter: IPyNbFile) -> list[IPyNbCell]:
    """The solutions of a chapter's exercises as further cells, run in its kernel after its last one."""
    return [
        IPyNbCell.from_parent(
            chapter,
            name=f"Solution {number}",
            cell_num=len(chapter.nb.cells) + number,
            cell=nbformat.v4.new_code_cell(TRY.format(source=source), execution_count=1),
            options=defaultdict(bool, check=True),
        )
        for number, source in enumerate(solved_exercises(chapter.nb), start=1)
    ]


def pytest_collection_modifyitems(items: list) -> None:
    last = {item.parent: i for i, item in enumerate(items) if isinstance(item, IPyNbCell)}
    for chapter, i in reversed(last.items()):
        items[i + 1 : i + 1] = solutions(chapter)
