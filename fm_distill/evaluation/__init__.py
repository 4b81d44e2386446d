"""Student against teacher on whole splits, and predictions. Imports `networks` and below."""
