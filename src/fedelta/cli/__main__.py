from fedelta.cli.app import main

main()
