"""Recorded teacher outputs: how they are encoded, stored, checked and read ahead.

Imports `config`, `system` and `errors`. One recording is a folder of shards and manifests:
`manifest.py` says what is complete, `shards.py` holds the arrays, `header.py` what they depend on.
"""
