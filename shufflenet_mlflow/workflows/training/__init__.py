"""The steps of a training run: request, resume point, config, data, state, run."""
