"""Clusters that run: all nodes on this machine and their page, rollouts to boards, a coordinator that follows them."""
