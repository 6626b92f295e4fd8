"""`python -m cytosae_pipeline` is the command line."""

from cytosae_pipeline.cli.app import main

if __name__ == "__main__":
    main()
