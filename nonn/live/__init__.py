"""Clusters that run: all nodes on this machine and their page, rollouts to boards, a coordinator that follows them."""

#: Where the live page is served on 127.0.0.1, unless told otherwise.
PAGE_PORT = 7080
