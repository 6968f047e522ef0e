"""The proof: one axis grown through the whole graph, op by op."""
