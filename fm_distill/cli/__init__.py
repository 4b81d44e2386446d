"""The command line: thin layers over public functions. Imports any room but `notebooks`."""
