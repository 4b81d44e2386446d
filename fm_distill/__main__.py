"""`python -m fm_distill` is `fm-distill`."""

from fm_distill.cli.main import main

if __name__ == "__main__":
    main()
