"""Leave a module and random states as they were.

Objects come in, and are restored afterwards. May import nothing of the package; pure torch.
"""
