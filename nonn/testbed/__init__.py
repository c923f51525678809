"""This machine in place of devices and links: emulation, live runs, composed latencies, campaigns."""
