"""Student against teacher on splits, and predictions. Imports `networks`, `exporting`, below."""
