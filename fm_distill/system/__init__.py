"""Devices, processes, signals, files and the console. Imports `config` and `errors`."""
