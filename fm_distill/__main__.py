"""`python -m fm_distill` is `fm-distill`."""

from fm_distill.cli import main

if __name__ == "__main__":
    main()
