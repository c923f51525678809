"""All that decides a trained weight: networks, views, losses, optimizers, the loop."""
