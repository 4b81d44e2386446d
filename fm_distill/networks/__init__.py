"""Student and teachers with their inputs and weights. Imports `runs`, `data` and below."""
