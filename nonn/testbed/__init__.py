"""This machine plays devices and links: emulation, live runs, composed latencies, campaigns."""
