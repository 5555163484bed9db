"""The parts of a search: its plan, its candidates, their scores, its record, and its runs in MLflow."""
