"""A run from open data to a trained student: feeds, loop, resume. Imports `preparation`, below."""
