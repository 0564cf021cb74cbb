"""The site of the chapters: it builds and reads offline, with the outputs of the notebooks and its own MathJax."""

import shutil
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent

# The chapters as they are stored, copied to where Sphinx looks for sources.
shutil.rmtree(HERE / "chapters", ignore_errors=True)
(HERE / "chapters").mkdir()
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(notebook, HERE / "chapters")

project = "minisd"
author = "The minisd authors"
copyright = "The minisd authors, MIT licence"
language = "en"
extensions = ["myst_nb"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_image_options = {"alt": "what the cell above draws"}

html_theme = "sphinx_book_theme"
html_title = "minisd: Stable Diffusion from scratch"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"show_toc_level": 2, "navbar_persistent": [], "use_download_button": False}
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}

# Of the package that carries MathJax only the one file that typesets as SVG, which needs no fonts beside it.
mathjax = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0], "static/mathjax/tex-svg.js")
html_static_path = [str(mathjax)]
mathjax_path = mathjax.name
