"""The command line: one command a file, errors as one line, heavy imports only inside commands."""
