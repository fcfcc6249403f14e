"""The old name of `trainers.emdpo`, for one release: dotted paths such as `trainers.em.simulated.by_aspect`."""

import warnings

from ..emdpo import __path__  # noqa: F401, submodules are found there

warnings.warn("trainers.em is now trainers.emdpo.", FutureWarning, stacklevel=2)
