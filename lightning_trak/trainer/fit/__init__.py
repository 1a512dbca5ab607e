"""What happens during ``fit``, besides featurizing; may import `host` and `featurizing`.

`checkpoint_io` sees files come and go, `checkpoint_files` finds those of a resumed run, `queue` decides which
checkpoints are featurized when, `pace` keeps to a budget of time, `loss_check` compares losses, `logs` tells loggers.
"""
