"""Serving: the router in front of a model's two slots, and the releases in them."""
