"""The network that students imitate: training or importing it, and its signals for every image."""
