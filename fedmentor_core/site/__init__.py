"""A domain at its own site: what it is asked, what it answers, and how the server knows whose answer it is."""
