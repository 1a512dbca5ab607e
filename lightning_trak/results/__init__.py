"""What the user gets: attributions, and plots of them.

Scores come in. May import `influence` and `metrics`; no Lightning.
"""
