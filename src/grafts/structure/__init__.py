"""What the modules of a model are for: roles, attention, the residual stream, and the interface that says so."""
