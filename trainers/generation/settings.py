from ..runs.settings import *  # noqa: F403, until all branches name the new place
