"""From a file and options to a checked, resolved run. Imports `train_step`, `networks`, below."""
