"""The figures of the paper: a script each, and what they share."""
