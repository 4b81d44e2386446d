"""Students as files for other tools. Imports `runs`, `data`, `weights` and below."""
