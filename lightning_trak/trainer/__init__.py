"""The only room that sees a Trainer. Checkpoints and loaders come in, attributions go out.

May import all other rooms but `evaluation`. Its own rooms, of which each may import those before it:

- `host`: what the program around us gives: Lightning under both its names, loaders, device, progress bar, messages.
- `featurizing`: from a model to a plan, and from examples at a checkpoint to features in the store.
- `fit`: what happens during ``fit`` besides: files come and go, checkpoints wait, time and loss are watched.
- `callback`: Lightning's hooks, connected to all that; `arguments` checks its arguments.
- `attributing`: from the features of train set and targets to scores, and to what is asked about them later.
- What a user calls: `attribute`, `suspects`, `forecast` (``dry_run``), `cli`.
"""
