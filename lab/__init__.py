"""What the paper's method does not need: extensions that plug into the core, see lab/README.md."""
