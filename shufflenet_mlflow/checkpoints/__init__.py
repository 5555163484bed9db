"""The checkpoint file: its schema, writing, verification and loading, and the folders that hold it."""
