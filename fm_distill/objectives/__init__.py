"""Distances between student and teacher outputs. Imports `config`."""
