"""Multi-Instance GPU: what fits on a GPU, layouts of nodes, and the change of a node from one layout to another."""
