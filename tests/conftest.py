"""What every test runs under: one thread a process, the same examples each time, shapes checked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import hypothesis
import jaxtyping

jaxtyping.install_import_hook("minisd", "shapes.check")

hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
