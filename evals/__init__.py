"""Quality and speed of any artifact, side by side, against the checkpoint it came from."""
