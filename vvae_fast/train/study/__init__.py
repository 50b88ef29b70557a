"""Several runs compared: the command `compare`, studies in YAML files, their plots."""
