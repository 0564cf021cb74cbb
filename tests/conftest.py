"""What every test runs under: one thread a process (`make test` starts two), the same examples each time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import hypothesis

hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
