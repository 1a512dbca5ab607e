"""What the user gets: attributions, and pictures of them.

Scores come in. May import `influence` and `metrics`; no Lightning.
"""
