"""The verbs: plan, add, activate, merge, combine, and what keeps account of them."""
