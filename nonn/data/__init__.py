"""Images in: one reader for each kind of source, and the dataset that they become."""
