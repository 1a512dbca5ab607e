"""The only room that sees a Trainer: the callback, `attribute`, and the featurization loop.

Checkpoints and loaders come in, attributions go out. May import all other rooms but `evaluation`.
"""
