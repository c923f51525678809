"""The network that students imitate: trained or imported, and what it says of every image."""
