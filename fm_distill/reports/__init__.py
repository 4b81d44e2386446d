"""Pages and pictures of runs. Imports `evaluation`, `training` and below."""
