"""Where weights are and in which precision: plans, and streaming along them. Knows nothing of layers or models."""
