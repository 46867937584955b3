"""What `python -m launch eval` runs on a model besides bits per byte: harness tasks and MERA."""
