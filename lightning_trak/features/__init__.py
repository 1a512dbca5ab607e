"""From a batch to its features: gradients, projected as they appear.

Batches come in, blocks of features go out. May import `gradients` and `projection`; no Lightning.
"""
