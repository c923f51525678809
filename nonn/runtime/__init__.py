"""What runs on devices: nodes, the coordinator, and the protocol between them. Never imports torch."""
