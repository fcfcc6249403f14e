"""`python -m polypo` is `polypo`."""

from . import main

if __name__ == "__main__":
    main()
