"""Pictures with matplotlib: targets beside training examples, bars, curves.

Scores, and what is known of examples, come in; figure and axes go out. May import the rest of `results` but
`attribution`. matplotlib is imported when something is drawn, since it is optional.
"""
