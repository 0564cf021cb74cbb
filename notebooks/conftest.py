"""Puts the kernels of the tests under the environment that the stored outputs were made with."""

import os

from build import ENVIRONMENT

os.environ.update(ENVIRONMENT)
