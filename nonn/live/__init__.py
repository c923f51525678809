"""`nonn up`: all nodes of a cluster on this machine, and the page that shows them."""
