"""The compiled step: targets, loss, gradient, update. Pure. Imports `networks`, `objectives`."""
