"""What other libraries see: the adapter mixin of `transformers`, its Trainer, its loading of models."""
