"""Callbacks that bring this project's checkpoints to other training frameworks, each in an extra of its own."""
