import sys

__version__ = "1.0"

if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]}: expected 3.11 or newer")
