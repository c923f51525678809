"""Questions beside the pipeline, each asked by a command: other partitions, probes, rivals, the map of factors."""
