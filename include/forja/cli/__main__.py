"""``python -m forja.cli``: what ./forja runs in the control environment."""

from forja.cli import main

if __name__ == "__main__":
    main()
