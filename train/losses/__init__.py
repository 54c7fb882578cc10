"""What is minimised: losses by name."""
