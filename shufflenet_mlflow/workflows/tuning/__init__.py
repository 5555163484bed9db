"""The parts of a study: its rungs, its sampling, its store, its trials, and its run in MLflow."""
