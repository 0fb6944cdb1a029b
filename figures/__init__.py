"""The figures of the paper: a script each, and what they share."""

import plumbing  # noqa: F401  first: it takes care of Ctrl-C while torch is imported
