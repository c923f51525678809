"""Running clusters: all nodes on this machine and their page, rollouts to boards, coordinators for applications."""

#: Where the live page is served on 127.0.0.1, unless told otherwise.
PAGE_PORT = 7080
