"""Builds the chapters: runs each from top to bottom and stores it so that the same chapter is always the same bytes.

    python notebooks/build.py run             all chapters
    python notebooks/build.py run 01 05       two of them
    python notebooks/build.py text 05         writes 05_*.py, the cells as text for an editor
    python notebooks/build.py fromtext 05     takes that text back into the notebook (or a new one) and removes it

A notebook is one copy of text, code and outputs. What would differ from run to run is taken out: ids of cells, metadata
of the run, splits of printed text, addresses, live widgets (their still picture stays). Pictures are stored with 128
colours. Cells tagged `nbval-ignore-output`, such as timings, keep their stored outputs as long as nothing else in the
chapter has changed.
"""

import argparse
import base64
import io
import os
import re
import time
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
COLORS = 128
LIVE = "application/vnd.jupyter.widget-view+json"

# What a kernel runs under, here and in the tests: one thread and no progress bars, so that outputs can be compared.
ENVIRONMENT = {
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",
}


def chapters(numbers: list[str], suffix: str = ".ipynb") -> list[Path]:
    """The files of these chapter numbers, all without any."""
    paths = sorted(HERE.glob(f"[0-9][0-9]_*{suffix}"))
    if missing := [n for n in numbers if not any(path.name.startswith(f"{n}_") for path in paths)]:
        raise SystemExit(f"no chapter {', '.join(missing)}; there are {', '.join(path.name for path in paths)}")
    return [path for path in paths if not numbers or path.name[:2] in numbers]


def fewer_colors(png: str) -> str:
    """A base64 PNG with at most COLORS colours, or as it came where that is smaller or has a palette already."""
    original = base64.b64decode(png)
    picture = Image.open(io.BytesIO(original))
    if picture.mode == "P":
        return png
    buffer = io.BytesIO()
    few = picture.convert("RGB").quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True)
    return base64.b64encode(min(buffer.getvalue(), original, key=len)).decode()


def same_everywhere(text: str) -> str:
    """Printed text without addresses in memory, the kernel's file names and the place of this repository."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x0", text)
    text = re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", text)
    return text.replace(f"{HERE.parent}{os.sep}", "")


def merge_streams(outputs: list) -> list:
    """Joins neighbouring pieces of one stream: where a kernel splits what it prints is chance."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def normalise(notebook, name: str):
    """Takes everything out of a notebook that depends on when and where it ran."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        }
    )
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name[:2]}-{number:03d}"
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "text" in output:
                output.text = same_everywhere(output.text)
            if "traceback" in output:
                output.traceback = [same_everywhere(line) for line in output.traceback]
            output.get("metadata", {}).clear()
            data = output.get("data", {})
            if LIVE in data:
                assert "image/png" in data, f"{cell.id}: a widget without a still picture; use minisd.widgets.explorer"
                del data[LIVE]
            if "text/plain" in data:
                data["text/plain"] = same_everywhere(data["text/plain"])
            if "image/png" in data:
                data["image/png"] = fewer_colors(data["image/png"])
    return notebook


def solved_exercises(notebook) -> list[str]:
    """For every exercise its folded solution followed by its check: code that must print "Right"."""
    solved, check = [], None
    for cell in notebook.cells:
        if "check" in cell.metadata.get("tags", []):
            check = cell.source
        elif cell.cell_type == "markdown" and "<details>" in cell.source and check:
            solution = "\n".join(re.findall(r"^```python\n(.*?)^```", cell.source, re.DOTALL | re.MULTILINE))
            solved.append(f"{solution}\n{check}")
            check = None
    return solved


def keep_ignored_outputs(new, old) -> None:
    """Where only outputs that differ by machine have changed, such as timings, keeps the stored ones."""

    def ignored(cell) -> bool:
        return "nbval-ignore-output" in cell.metadata.get("tags", [])

    def compared(notebook) -> list:
        return [(cell.source, cell.metadata, None if ignored(cell) else cell.get("outputs")) for cell in notebook.cells]

    if compared(new) == compared(old):
        for cell, stored in zip(new.cells, old.cells, strict=True):
            if ignored(cell) and stored.outputs:
                cell.outputs = stored.outputs


def dumps(notebook) -> str:
    return nbformat.writes(notebook, version=4) + "\n"


def run(path: Path) -> None:
    """Executes a chapter and stores it; a cell that fails without the tag `raises-exception` ends the build."""
    begun = time.perf_counter()
    stored = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(stored, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", store_widget_state=False, record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )  # fmt: skip
    client.execute(env={**os.environ, **ENVIRONMENT})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            # a figure that fails while it is displayed doesn't stop the run
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                raise SystemExit(f"{path.name}: {output.ename}: {output.evalue}\nin the cell\n{cell.source}")
    normalise(notebook, path.name)
    keep_ignored_outputs(notebook, nbformat.reads(stored, as_version=4))
    text = dumps(notebook)
    if text != stored:
        path.write_text(text, encoding="utf-8", newline="\n")
    verdict = "unchanged" if text == stored else "stored"
    print(f"{path.name}: {len(text.encode()) / 1e3:.0f} kB, {time.perf_counter() - begun:.0f} s, {verdict}", flush=True)


def to_text(path: Path) -> None:
    """Writes the cells as py:percent text beside the notebook."""
    jupytext.write(nbformat.read(path, as_version=4), path.with_suffix(".py"), fmt="py:percent")
    print(path.with_suffix(".py"))


def from_text(path: Path) -> None:
    """Takes py:percent text into the notebook beside it; cells that didn't change keep their outputs."""
    target = path.with_suffix(".ipynb")
    notebook = jupytext.read(path, fmt="py:percent")
    if target.exists():
        old = nbformat.read(target, as_version=4)
        notebook = combine_inputs_with_outputs(notebook, old)
        known = {cell.source for cell in old.cells}
        for cell in notebook.cells:  # jupytext also keeps the outputs of cells that are merely alike
            if cell.cell_type == "code" and cell.source not in known:
                cell.outputs = []
    target.write_text(dumps(normalise(notebook, path.name)), encoding="utf-8", newline="\n")
    path.unlink()
    print(f"{target}: now run it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "text", "fromtext"])
    parser.add_argument("chapter", nargs="*", help="two digits; all without any")
    arguments = parser.parse_args()
    work = {"run": run, "text": to_text, "fromtext": from_text}[arguments.action]
    for chapter in chapters(arguments.chapter, ".py" if work is from_text else ".ipynb"):
        work(chapter)
