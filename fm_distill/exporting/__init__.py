"""Students as files for other tools. Imports `runs`, `weights`, `views`."""
