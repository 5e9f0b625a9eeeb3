"""What tests share: base models, adapters for them, what two computations may differ by, a hub."""
