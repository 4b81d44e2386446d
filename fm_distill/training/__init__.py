"""From a config to a trained student: step, program, loop. Imports `evaluation` and below."""
