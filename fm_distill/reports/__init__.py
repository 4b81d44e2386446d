"""Pages and pictures of runs, and sweeps over them. Imports `evaluation`, `training` and below."""
