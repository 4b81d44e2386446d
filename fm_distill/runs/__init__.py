"""A run on disk: state, checkpoints, metrics, status. Imports `weights` and below."""
