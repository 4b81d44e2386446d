"""What networks see of a batch: crops, draws, rendering. Imports `config`, `array_tree`."""
