# make             set up everything, draw a picture from a prompt with the bundled model, say where it is
# make test        set up everything, pass all tests
# make lab         open the course
# make notebooks   run every chapter anew and store its outputs, byte for byte the same when nothing changed
# make book        build the site of the chapters into book/_build/html

PY ?= python3
PROMPT ?= a watercolor of an orange cat with blue eyes on a beach
SEED ?= 7

BIN := .venv/bin
READY := .venv/.ready

export PROMPT  # the shell takes it from its environment as it was written, quotes and all

# glibc gives freed memory back after each layer and asks for it again: a tenth of a picture's time, if it may.
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_MMAP_THRESHOLD_ := 4294967296

.PHONY: picture test lab notebooks book clean

picture: $(READY)
	$(BIN)/minisd "$$PROMPT" --seed $(SEED) --output picture.png --force

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m pytest -n 2 --dist loadfile --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg notebooks
	$(MAKE) book

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir notebooks

notebooks: $(READY)
	$(BIN)/python notebooks/build.py run

book: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going book book/_build/html
	@echo "book/_build/html/index.html"

clean:
	rm -rf .venv book/_build book/chapters

$(READY): pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,test,book]'
	@touch $@
