"""Measurements: how faithful a cache is, at how many bytes. Uses the library as a user would."""
