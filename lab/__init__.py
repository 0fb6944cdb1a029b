"""What the paper's method does not need: extensions that plug into the core, see lab/README.md."""

import plumbing  # noqa: F401  first: it takes care of Ctrl-C while torch is imported
