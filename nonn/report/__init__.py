"""Tables and figures from the numbers of other stages; no module here imports torch."""
