"""The store on disk: checkpoints, their weights, and the features of the train set.

Arrays come in and go out. May import `data`; no Lightning.
"""
