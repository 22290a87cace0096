"""Corpora: from a name, path, stream or data set to the documents that are scored."""
