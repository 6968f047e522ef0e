"""For those who write rules: the judge that holds a rule against the real op."""
