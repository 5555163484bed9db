"""Everything that talks to MLflow: client, journal, delivery, messages, and resolving run IDs and models."""
