"""Entry point of ``organfast`` and ``python -m organfast``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; exit codes are documented in ``organfast --help``."""
    from organfast.cli import run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
