"""The parts of `python -m launch mixture`."""
