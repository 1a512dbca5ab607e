"""What the user gets: attributions, with the ids and labels of their examples; plots, tables and reports of them.

Scores come in. May import `influence`, `metrics`, and the rooms above; no Lightning.
"""
