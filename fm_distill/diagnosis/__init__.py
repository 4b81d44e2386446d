"""What is wrong with a run, by name: measured, judged, shown. Imports `training` and below."""
