"""Benchmarks: ``./forja bench NAME --json``. Each prints one JSON object as its last line."""
