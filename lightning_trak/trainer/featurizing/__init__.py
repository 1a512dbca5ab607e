"""From a model and its loaders to features in the store; may import `host`.

`plan` chooses how, `opening` makes or opens the store, `reading` reads examples, `preflight` tries a few,
`featurization` turns batches into features, `curvature` whitens them, `checkpoints` fills one checkpoint, and
`train_features` hands what is stored to the estimator.
"""
