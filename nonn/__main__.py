from nonn.cli import main

main()
