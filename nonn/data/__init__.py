"""Reading images: one reader for each kind of source, and the data set that they become."""
