"""Pages and pictures of runs, sweeps, compressions. Imports `evaluation`, `training`, below."""
