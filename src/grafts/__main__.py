"""``python -m grafts`` is ``grafts``: for launchers that start a module (``torchrun -m grafts train``)."""

from grafts.cli.main import main

if __name__ == "__main__":
    main()
