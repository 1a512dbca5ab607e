"""Examples by row, batches of any structure; the identity of a dataset, and the ids and labels that it tells.

A user's loader comes in; batches with the rows of their examples go out. May import `isolation`; no Lightning.
"""
