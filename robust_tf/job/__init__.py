"""A training job from its records to its results: the application around the library in `robust_tf.training`.

`run` has the order of a job. `task` and `building` make what it trains, `fitting` and `head_fitting` train it,
`testing` evaluates it, and `outputs` writes and prints the results. `sources` and `workdir` know its files, and
`planning` is what `--dry_run` prints.
"""
