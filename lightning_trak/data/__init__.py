"""Examples by row, batches of any structure, and the identity of a dataset.

A user's loader comes in; batches with the rows of their examples go out. May import `isolation`; no Lightning.
"""
