"""What must not change: a module as it was, and random states as they were.

Objects come in, and are put back. May import nothing of the package; pure torch.
"""
