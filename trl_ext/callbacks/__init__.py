"""Callbacks that watch a run; they change nothing of the training."""
