"""A training job, from its configuration to its results: the application around the library in `robust_tf.training`.

`run` runs the steps of a job in order: `task` and `building` create the data and the classifier, `fitting` and
`head_fitting` train it, `testing` evaluates it, and `results` and `outputs` collect, write and print the results.
`sources` loads the source of a transfer, `workdir` checks the folders, and `planning` makes the plan that `--dry_run`
prints.
"""
