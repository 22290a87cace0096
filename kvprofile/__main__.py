"""``python -m kvprofile``."""

from kvprofile.cli import main

if __name__ == "__main__":
    main()
