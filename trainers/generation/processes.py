from ..runs.processes import *  # noqa: F403, until all branches name the new place
