"""Do scores predict retraining? Ground truth, counterfactuals, and measures of scores against them.

A user's own training comes in, measures go out. May import all other rooms.
"""
