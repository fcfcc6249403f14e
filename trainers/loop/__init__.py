"""The old name of `trainers.generation`, for one release: dotted paths such as `trainers.loop.rewards.rouge_l`."""

import warnings

from ..generation import *  # noqa: F403
from ..generation import __path__  # noqa: F401, submodules are found there

warnings.warn("trainers.loop is now trainers.generation.", FutureWarning, stacklevel=2)
