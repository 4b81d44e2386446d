"""Devices, processes, signals and the console. Imports `config` and `errors`."""
