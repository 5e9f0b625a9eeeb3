"""What one `nn.Module` is: its kind of layer, its weights, its place in a tree, its name.

Nothing here knows adapters.
"""
