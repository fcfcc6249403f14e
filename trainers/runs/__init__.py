"""Folders of work that survive a kill: files, settings, stages, checkpoints, and the processes that share them."""
