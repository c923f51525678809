"""Words that everyone shares: parameters, paths, files, errors, links, boards. Never imports torch."""
