"""Do scores predict retraining? Ground truth, counterfactuals, and scores measured against them.

A user's training comes in, measures go out. May import all other rooms.
"""
