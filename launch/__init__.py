"""The command line: `python -m launch COMMAND`. One thin file per command."""
