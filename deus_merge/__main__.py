"""``python -m deus_merge`` is ``deus-merge``."""

from .cli import main

if __name__ == "__main__":
    main()
