"""What runs on the devices and between them."""
