from .runs.checkpoints import *  # noqa: F403, until all branches name the new place
