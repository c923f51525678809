"""The paper's decisions: filter graph, partition, sizes of students, final layer, missing students."""
