"""A training job from its flags to its results: the application around the library in `training`."""
