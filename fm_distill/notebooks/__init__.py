"""Runs inside notebooks: packing, live figures, backups. Imports `reports`, `cli` and below."""
