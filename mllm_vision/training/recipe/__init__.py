"""The parser of flags and YAML, the arguments, the run folder and its summary."""
