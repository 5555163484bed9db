"""The checkpoint file: its schema, writing, verification and loading, and folders of checkpoints."""
