"""From the features of train set and targets to scores; may import all that comes before.

`ckpt_path` says which checkpoints, `job` holds them with model and data, `target_features` and `scoring` compute, and
the store keeps both. `describing` and `losses` ask the model for more, `kept` and `parts` answer later questions.
"""
