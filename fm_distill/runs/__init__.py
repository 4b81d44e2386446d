"""A run on disk: state, checkpoints, metrics, status, student. Imports `data` and below."""
