"""Edge devices: what they are, what a bundle for one holds, how it is proven and handed over."""
