"""What `python -m launch train` does besides training: evaluation on the way, and a profile."""
