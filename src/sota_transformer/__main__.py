"""`python -m sota_transformer` is the command `sota`."""

from sota_transformer.cli import main

raise SystemExit(main())
