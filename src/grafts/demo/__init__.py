"""The main job on real input: a real encoder, real one-line texts in 16 classes, LoRA, and yardsticks in the same run."""
