"""Programs that run: start with `python examples/forex.py`."""
