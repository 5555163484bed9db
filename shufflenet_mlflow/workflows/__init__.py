"""One module per command, named like it, put together from the rooms below."""
