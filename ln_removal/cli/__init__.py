"""The command-line programs: each parses, calls one function and prints."""
