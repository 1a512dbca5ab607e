"""What ``python -m lightning_trak`` does, one file a command: a store on disk comes in, text goes out.

A command returns the exit status. May import the rooms that need no Lightning; ``__main__`` parses the arguments.
"""
