"""The training loop, its state, meter, random state, recipe and BN statistics. Nothing here knows MLflow."""
