"""The only room that sees a Trainer: the callback, `attribute`, and the featurization loop.

Checkpoints and loaders come in, attributions go out. May import all other rooms but `evaluation`. In the order of the
data:

- During ``fit``: `callback` connects Lightning's hooks; `checkpoint_io` sees files come and go, `queue` decides what
  becomes of them, `checkpoint_files` finds those of a resumed run; `pace`, `loss_check` and `logs` look on.
- Examples at a checkpoint: `loaders` finds them, `reading` reads them, `preflight` tries a few, `featurization` turns
  them into features, `curvature` whitens; `losses` and `describing` need no gradients.
- From a model to a job: `plan`, `opening` (the store), `ckpt_path` (which checkpoints), `job`; `checkpoints` fills one.
- What a user calls: `attribute`, `suspects`, `forecast` (``dry_run``), `cli`; from `train_features` and
  `target_features` to scores in `scoring`; `kept` and `split` answer later questions.
- For all of them: `framework` (both names of Lightning), `attachment`, `arguments`, `progress`, `reports`.
"""
