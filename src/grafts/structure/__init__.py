"""What a model's modules are for: roles, attention, the residual stream, and the interface that says so."""
