"""The trainer: one YAML, one command, a checkpoint folder that every converter reads."""
