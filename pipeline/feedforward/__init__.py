"""Image transformation networks (Johnson et al. 2016): a style, or an enlargement, in one forward pass."""
