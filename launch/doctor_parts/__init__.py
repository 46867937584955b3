"""What `python -m launch doctor` looks at; each part returns findings."""
